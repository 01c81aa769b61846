"""What a phone says about itself, in the shapes that Android's services print."""

from __future__ import annotations

from typing import Any

import pytest

from edgeft.bench.devices.adb import chosen, phones_in
from edgeft.bench.devices.android import _hint
from edgeft.bench.devices.android_facts import android_facts, battery_of, energy, screen_of, thermal_of
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.linux import sections_of

BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging current: 500000
  Charge counter: 3214000
  status: 2
  health: 2
  present: true
  level: 85
  scale: 100
  voltage: 4210
  temperature: 289
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
	callbacks: 2
Thermal Status: 0
Cached temperatures:
	Temperature{mValue=99.0, mType=3, mName=skin, mStatus=0}
HAL Ready: true
HAL connection:
	ThermalHAL AIDL 2  connected: yes
Current temperatures from HAL:
	Temperature{mValue=36.25, mType=0, mName=BIG, mStatus=0}
	Temperature{mValue=31.1, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
	Temperature{mValue=4130.0, mType=6, mName=vbat, mStatus=0}
	Temperature{mValue=85.0, mType=8, mName=soc, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}
	CoolingDevice{mValue=3, mType=1, mName=fcc}
Temperature static thresholds from HAL:
	TemperatureThreshold{mType=3, mName=VIRTUAL-SKIN, mHotThrottlingThresholds=[NaN, 39.0, 43.0, 45.0, 47.0, NaN]}
"""
PROPERTIES = """[ro.build.version.release]: [15]
[ro.build.version.sdk]: [35]
[ro.product.cpu.abilist64]: [arm64-v8a]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 8]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [Tensor G3]
"""


def test_what_a_phone_refuses_is_answered_with_what_to_do() -> None:
    assert "unlock the phone once" in _hint("mkdir: '/data/local/tmp/x': Required key not available")
    assert "free space" in _hint("write: No space left on device")
    assert "work profile" in _hint("mkdir: Permission denied")


def test_a_battery_has_level_heat_voltage_and_whether_it_charges() -> None:
    assert battery_of(BATTERY) == {
        "percent": 85, "temperature_c": 28.9, "current_ma": None, "voltage_mv": 4210, "charging": True
    }  # fmt: skip
    on_battery = battery_of(
        BATTERY.replace("status: 2", "status: 3")
        .replace("USB powered: true", "USB powered: false")
        .replace("scale: 100", "scale: 170")
    )
    assert on_battery and (on_battery["charging"], on_battery["percent"]) == (False, 50)
    held = BATTERY.replace("status: 2", "status: 4")  # a charge limit: not charging, and fed by the cable
    assert "USB powered: true" in held and (battery_of(held) or {})["charging"] is True
    assert (battery_of(held.replace("  status: 4\n", "")) or {})["charging"] is True
    assert battery_of("Can't find service: battery") is None


def test_heat_is_what_the_sensors_say_now_and_the_verdict_the_systems() -> None:
    cool = thermal_of(THERMAL)
    assert cool == {"status": 0, "zones": {"BIG": 36.25, "VIRTUAL-SKIN": 31.1}, "throttled": False}
    for change in (("Thermal Status: 0", "Thermal Status: 2"), ("mValue=0, mType=2", "mValue=4, mType=2")):
        hot = thermal_of(THERMAL.replace(*change))
        assert hot and hot["throttled"]
    assert thermal_of("Can't find service: thermalservice") is None


@pytest.mark.parametrize(
    ("power", "window", "expected"),
    [
        ("  mWakefulness=Awake\n", "    showing=false\n", "on"),
        ("  mWakefulness=Awake\n", "    showing=true\n    mShowingDream=false\n", "locked"),
        ("  mWakefulness=Dozing\n", "    showing=true\n", "off"),
        ("", "", None),
    ],
)
def test_the_screen_is_on_locked_or_off(power: str, window: str, expected: str | None) -> None:
    assert screen_of(power, window) == expected


def test_a_phones_facts_are_those_of_its_linux_and_of_its_services() -> None:
    lines = ["@ machine", "aarch64", "@ cpuinfo", *("processor : 0", "Features : fp asimd", "CPU part : 0xd05", ""),
             *("processor : 1", "Features : fp asimd", "CPU part : 0xd44"), "@ cpu0 cpuinfo_max_freq", "1803000",
             "@ cpu1 cpuinfo_max_freq", "2850000", "@ cpu1 scaling_governor", "sched_pixel", "@ getprop",
             *PROPERTIES.splitlines(), "@ dumpsys battery", *BATTERY.splitlines(), "@ dumpsys thermalservice",
             *THERMAL.splitlines(), "@ dumpsys power", "mWakefulness=Awake", "@ end"]  # fmt: skip
    facts = android_facts(sections_of(lines))
    expected = {"model": "Google Pixel 8", "soc": "Google Tensor G3", "machine": "aarch64", "screen": "on",
                "os": "Android 15 (API 35)", "temperature_c": 36.25, "governor": "sched_pixel"}  # fmt: skip
    assert {key: facts[key] for key in expected} == expected
    assert [cluster["cpus"] for cluster in facts["clusters"]] == [[0], [1]] and facts["battery"]["percent"] == 85
    assert facts["ram_bytes"] is None and facts["absent"]["ram_bytes"]


def test_a_phone_that_tells_nothing_has_a_reason_for_every_null() -> None:
    facts = android_facts(sections_of(["@ machine", "aarch64", "@ getprop", "@ end"]))
    assert facts["machine"] == "aarch64"
    assert {key for key, value in facts.items() if value is None} == set(facts["absent"])


def test_energy_is_current_times_voltage_times_the_time_of_a_token() -> None:
    samples: list[dict[str, Any]] = [{"decode_s": [0.05, 0.05, 0.06]}]
    trace = [{"current_ua": -1_000_000, "voltage_uv": 4_000_000}] * 3
    found = energy(trace, samples, charging=False)
    assert found["watts"] == pytest.approx(4.0) and found["joules_per_token"] == pytest.approx(0.2)
    assert "charging" in energy(trace, samples, charging=True)["absent"]
    assert "gauge" in energy([{"current_ua": None, "voltage_uv": None}], samples, False)["absent"]
    assert "unit" in energy([{"current_ua": -900, "voltage_uv": 4_000_000}], samples, False)["absent"]


LISTING = "List of devices attached\n{}\n"


@pytest.mark.parametrize(
    ("phones", "serial", "words"),
    [
        ("", "", "no phone"),
        ("A\tdevice\nB\tdevice", "", "2 phones: A, B"),
        ("A\tunauthorized", "", "allow USB debugging"),
        ("A\toffline\nB\tdevice", "A", "offline"),
        ("A\tno permissions (missing udev rules? user is in the plugdev group); see [x]", "", "udev"),
        ("A\tdevice", "C", "no phone called 'C'; it sees: A"),
        ("A\trecovery", "A", "into Android"),
        ("A\tsomething new", "A", "something new"),
    ],
)
def test_a_phone_that_cannot_be_used_is_refused_with_what_to_do(phones: str, serial: str, words: str) -> None:
    with pytest.raises(DeviceError) as raised:
        chosen(phones_in(LISTING.format(phones)), serial)
    assert words in str(raised.value)


def test_the_phone_that_is_meant_is_found() -> None:
    listing = "* daemon started successfully\n" + LISTING.format("A\tunauthorized\n192.168.1.7:5555\tdevice")
    assert chosen(phones_in(listing), "") == "192.168.1.7:5555" == chosen(phones_in(listing), "192.168.1.7:5555")
