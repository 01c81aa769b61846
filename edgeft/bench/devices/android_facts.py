"""What Android tells of itself beside Linux: properties, battery, thermal service, screen; and the energy per token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from edgeft.bench.devices.linux import PROBE, Sections, facts_of

# Android's own services, after the script for any Linux; each answer again after a line "@ NAME".
ANDROID_PROBE = (
    PROBE
    + r"""
echo "@ getprop"; getprop 2>/dev/null
echo "@ dumpsys battery"; dumpsys battery 2>/dev/null
echo "@ dumpsys thermalservice"; dumpsys thermalservice 2>/dev/null
echo "@ dumpsys power"; dumpsys power 2>/dev/null | grep -E 'mWakefulness=|Display Power: state='
echo "@ dumpsys window"; dumpsys window policy 2>/dev/null | grep -iE 'showing'
echo "@ end"
"""
)
CHARGING, FULL = 2, 5  # android.os.BatteryManager.BATTERY_STATUS_*
NOT_HEAT = range(6, 9)  # android.os.Temperature types: battery current limits, in volts, amperes and percent
OF_CPU = 2  # android.os.CoolingDevice type
PROPERTY = re.compile(r"^\[([^\]]+)\]: \[(.*)\]$", re.MULTILINE)
READING = re.compile(r"Temperature\{mValue=([-\d.]+), mType=(\d+), mName=([^,]*), mStatus=(\d+)\}")
COOLING = re.compile(r"CoolingDevice\{mValue=(\d+), mType=(\d+), mName=([^}]*)\}")
LEAST_UA = 20_000  # a phone that computes draws more: a smaller number is no number of microamperes
NO_CURRENT = "the battery's gauge does not tell current and voltage to programs"


def android_facts(found: Sections) -> dict[str, Any]:
    """A phone's facts (`facts.FIELDS`) out of the answers to `ANDROID_PROBE`."""
    properties = dict(PROPERTY.findall(found.get("getprop", "")))
    plain = facts_of(found)
    battery = battery_of(found.get("dumpsys battery", ""))
    thermal = thermal_of(found.get("dumpsys thermalservice", ""))
    more: dict[str, Any] = {"soc": _soc(properties), "model": _model(properties) or plain["model"]}
    more["cpu"] = plain["cpu"] or more["soc"]
    more["screen"] = screen_of(found.get("dumpsys power", ""), found.get("dumpsys window", ""))
    more["os"] = _system(properties) or plain["os"]
    more["battery"] = _joined(plain["battery"], battery)
    if thermal:
        zones = {**((plain["thermal"] or {}).get("zones") or {}), **thermal["zones"]}
        more |= {"thermal": {**thermal, "zones": zones}, "temperature_c": max(zones.values(), default=None)}
    return dict(facts_of(found, {key: value for key, value in more.items() if value is not None}))


def battery_of(text: str) -> dict[str, Any] | None:
    """`dumpsys battery`: level in percent, voltage in mV, temperature in tenths of a degree. It tells no current."""
    values = {}
    for line in text.splitlines():
        key, colon, value = line.strip().partition(": ")
        if colon:
            values[key] = value.strip()
    if "level" not in values:
        return None
    number = {key: int(value) for key, value in values.items() if value.lstrip("-").isdigit()}
    tenths = number.get("temperature")
    # A phone on a cable may be full, held at a limit, or even empty itself through a weak port.
    plugged_in = any(key.endswith(" powered") and value == "true" for key, value in values.items())
    return {
        "percent": round(100 * number["level"] / (number.get("scale") or 100)) if "level" in number else None,
        "temperature_c": None if tenths is None else tenths / 10,
        "current_ma": None,
        "voltage_mv": number.get("voltage"),
        "charging": plugged_in or (number["status"] in (CHARGING, FULL) if "status" in number else None),
    }


def thermal_of(text: str) -> dict[str, Any] | None:
    """`dumpsys thermalservice`: status (0 none to 6 shutdown), degrees C by sensor, whether the CPU is held back."""
    status = re.search(r"Thermal Status: (\d)", text)
    if not status:
        return None
    now = text.partition("Current temperatures from HAL")[2] or text  # what it remembers stands before that
    zones = {name: float(value) for value, kind, name, _ in READING.findall(now) if int(kind) not in NOT_HEAT}
    held = [name for value, kind, name in COOLING.findall(text) if int(kind) == OF_CPU and int(value) > 0]
    level = int(status[1])
    return {"status": level, "zones": zones, "throttled": level > 0 or bool(held)}


def screen_of(power: str, window: str) -> str | None:
    """'on', 'off' or 'locked', out of `dumpsys power` and `dumpsys window policy`."""
    awake = re.search(r"mWakefulness=(\w+)", power)
    if awake and awake[1] in ("Asleep", "Dozing"):
        return "off"
    if shown := re.search(r"(?:showing|mIsShowing|mShowingLockscreen|isKeyguardShowing)=(true|false)", window):
        return "locked" if shown[1] == "true" else "on"
    return "on" if awake else None


def energy(trace: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], charging: bool | None) -> Any:
    """{"joules_per_token", "watts"} of the whole phone while it decoded, or null with the reason in "absent".

    Power is the gauge's current times its voltage, looked at after every repeat.
    """
    powers = [
        abs(at["current_ua"]) * 1e-6 * at["voltage_uv"] * 1e-6
        for at in trace
        if at.get("current_ua") and at.get("voltage_uv")
    ]
    steps = [step for sample in samples for step in sample["decode_s"]]
    reason = None
    if charging:
        reason = "the phone is charging or on a cable: what the battery gives is not what the phone takes"
    elif not powers or not steps:
        reason = NO_CURRENT
    elif max(abs(at["current_ua"] or 0) for at in trace) < LEAST_UA:
        reason = f"the gauge shows less than {LEAST_UA // 1000} mA under load: it counts in another unit"
    if reason:
        return {"joules_per_token": None, "watts": None, "absent": reason}
    return {"joules_per_token": median(powers) * median(steps), "watts": median(powers), "absent": None}


def _joined(sysfs: dict[str, Any] | None, service: dict[str, Any] | None) -> dict[str, Any] | None:
    """The service's word where it has one: makers scale the files of /sys as they like."""
    if not sysfs or not service:
        return service or sysfs
    return {key: sysfs.get(key) if value is None else value for key, value in service.items()}


def _model(properties: Mapping[str, str]) -> str | None:
    maker, model = properties.get("ro.product.manufacturer", ""), properties.get("ro.product.model", "")
    return model if model.lower().startswith(maker.lower()) else f"{maker} {model}" if model else None


def _soc(properties: Mapping[str, str]) -> str | None:
    named = f"{properties.get('ro.soc.manufacturer', '')} {properties.get('ro.soc.model', '')}".strip()
    return named or properties.get("ro.board.platform") or properties.get("ro.hardware") or None


def _system(properties: Mapping[str, str]) -> str | None:
    release, sdk = properties.get("ro.build.version.release"), properties.get("ro.build.version.sdk")
    return f"Android {release} (API {sdk})" if release else None
