"""What a Linux tells of itself and its state through /proc and /sys: one small script for its shell, and its reading.

Any POSIX shell with cat and df will do (busybox, Android's toybox). The script changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeft.bench.devices.facts import make_facts
from edgeft.bench.host import cpu_model_of

# Each answer stands between a line "@ NAME" and the next such line; what cannot be read is missing.
PROBE = r"""
say() { [ -r "$2" ] && echo "@ $1" && cat "$2" && echo; }
echo "@ machine"; uname -m
echo "@ os"; uname -sr
echo "@ disk"; df -Pk . 2>/dev/null
say release /etc/os-release
say cpuinfo /proc/cpuinfo
say meminfo /proc/meminfo
say loadavg /proc/loadavg
say model /proc/device-tree/model
say product /sys/class/dmi/id/product_name
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
  for fact in cpuinfo_max_freq scaling_cur_freq scaling_governor; do
    say "${cpu##*/} $fact" "$cpu/cpufreq/$fact"
  done
  say "${cpu##*/} siblings" "$cpu/topology/thread_siblings_list"
done
for zone in /sys/class/thermal/thermal_zone*; do
  say "zone ${zone##*zone} type" "$zone/type"
  say "zone ${zone##*zone} temp" "$zone/temp"
done
for supply in /sys/class/power_supply/*; do
  for fact in type capacity status temp current_now voltage_now; do
    say "power ${supply##*/} $fact" "$supply/$fact"
  done
done
echo "@ end"
"""
NO_SENSOR = "the system does not report it"
REASONS = {
    "thermal": "no thermal zone is readable",
    "temperature_c": "no thermal zone is readable",
    "battery": "no battery is readable",
    "screen": "no screen that edgeft knows how to ask",
    "governor": "no cpufreq: a virtual machine, or the system does not show it",
    "frequency_mhz": "no cpufreq: a virtual machine, or the system does not show it",
    "python": "not asked for",
    "versions": "not asked for",
    "soc": "the system names none",
    "model": "the system names none",
}
HOTTEST_C = 150  # above it a reading is none

Sections = dict[str, str]


def sections_of(lines: Sequence[str]) -> Sections:
    """The script's answers by name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if line.startswith("@ "):
            name = line[2:].strip()
            found.setdefault(name, [])
        elif name:
            found[name].append(line)
    return {key: "\n".join(part).strip("\n\0 ") for key, part in found.items()}


def facts_of(found: Sections, more: dict[str, Any] | None = None, reasons: dict[str, str] | None = None) -> Any:
    """A device's facts (`facts.FIELDS`) from the script's answers; `more` and `reasons` add to them or take their
    place."""
    cores = _cores(found)
    zones = _zones(found)
    fastest = max(cores, key=lambda core: (core["max_mhz"] or 0, core["mhz"] or 0), default=None)
    memory = _memory(found)
    values = {
        "cpu": cpu_model_of(found.get("cpuinfo", "")),
        "machine": found.get("machine") or None,
        "model": found.get("model") or found.get("product") or None,
        "cores_logical": len(cores) or None,
        "cores_physical": len({core["siblings"] for core in cores}) or None,
        "clusters": _clusters(cores),
        "ram_bytes": memory.get("MemTotal"),
        "ram_free_bytes": memory.get("MemAvailable"),
        "disk_free_bytes": _disk_free(found),
        "load_average": [float(x) for x in found["loadavg"].split()[:3]] if found.get("loadavg") else None,
        "frequency_mhz": fastest["mhz"] if fastest else None,
        "governor": fastest["governor"] if fastest else None,
        "temperature_c": max(zones.values(), default=None),
        "thermal": {"status": None, "zones": zones, "throttled": None} if zones else None,
        "battery": _battery(found),
        "cpu_features": _features(found),
        "os": _system(found),
        **(more or {}),
    }
    return make_facts(values, {**REASONS, **(reasons or {})}, NO_SENSOR)


def _cores(found: Sections) -> list[dict[str, Any]]:
    """Of every logical core: number, those of the same physical core, part, clocks in MHz, governor."""
    parts: dict[int, str] = {}
    clocks: dict[int, float] = {}
    number = None
    for line in found.get("cpuinfo", "").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor" and value.isdigit():
            number = int(value)
            parts[number] = ""
        elif key == "CPU part" and number is not None:
            parts[number] = value
        elif key == "cpu MHz" and number is not None:
            clocks[number] = float(value)
    cores = []
    for cpu, part in sorted(parts.items()):
        cores.append(
            {
                "number": cpu,
                "siblings": found.get(f"cpu{cpu} siblings") or str(cpu),
                "part": part or None,
                "max_mhz": _mhz(found.get(f"cpu{cpu} cpuinfo_max_freq")),
                "mhz": _mhz(found.get(f"cpu{cpu} scaling_cur_freq")) or clocks.get(cpu),
                "governor": found.get(f"cpu{cpu} scaling_governor") or None,
            }
        )
    return cores


def _clusters(cores: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Cores of one kind together, the slowest kind first."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for core in cores:
        kinds.setdefault((core["max_mhz"] or 0.0, core["part"] or ""), []).append(core)
    clusters = [
        {
            "cpus": [core["number"] for core in kind],
            "physical": len({core["siblings"] for core in kind}),
            **{k: kind[0][k] for k in ("part", "max_mhz", "mhz", "governor")},
        }
        for _, kind in sorted(kinds.items())
    ]
    return clusters or None


def _memory(found: Sections) -> dict[str, int]:
    """Bytes by /proc/meminfo's names."""
    memory = {}
    for line in found.get("meminfo", "").splitlines():
        name, _, value = line.partition(":")
        if value.split()[1:] == ["kB"]:
            memory[name] = int(value.split()[0]) * 1024
    return memory


def _disk_free(found: Sections) -> int | None:
    """POSIX df: the fourth column of the last line, in KiB."""
    columns = found.get("disk", "").splitlines()[-1:]
    fields = columns[0].split() if columns else []
    return int(fields[3]) * 1024 if len(fields) > 4 and fields[3].isdigit() else None


def _zones(found: Sections) -> dict[str, float]:
    """Degrees C by the zone's name; the kernel counts in thousandths."""
    zones: dict[str, float] = {}
    for key, text in found.items():
        if key.startswith("zone ") and key.endswith(" temp") and text.lstrip("-").isdigit():
            name = found.get(key.removesuffix("temp") + "type") or key.split()[1]
            degrees = int(text) / 1000
            if 0 < degrees < HOTTEST_C:
                zones[name] = max(degrees, zones.get(name, 0.0))
    return zones


def _battery(found: Sections) -> dict[str, Any] | None:
    """The first supply of type Battery; the kernel counts in tenths of a degree, microamperes and microvolts."""
    for key, text in found.items():
        if key.startswith("power ") and key.endswith(" type") and text == "Battery":
            read = {fact: found.get(key.removesuffix("type") + fact, "") for fact in
                    ("capacity", "temp", "current_now", "voltage_now")}  # fmt: skip
            number = {fact: int(text) if text.lstrip("-").isdigit() else None for fact, text in read.items()}
            status = found.get(key.removesuffix("type") + "status")
            return {
                "percent": number["capacity"],
                "temperature_c": _scaled(number["temp"], 10),
                "current_ma": _scaled(number["current_now"], 1000),
                "voltage_mv": _scaled(number["voltage_now"], 1000),
                "charging": status in ("Charging", "Full") if status else None,
            }
    return None


def _features(found: Sections) -> list[str] | None:
    """Flags of the first core, as ARM's and x86's kernels name them."""
    for line in found.get("cpuinfo", "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("Features", "flags"):
            return value.split()
    return None


def _system(found: Sections) -> str | None:
    names = [line.partition("=")[2].strip('"') for line in found.get("release", "").splitlines()
             if line.startswith("PRETTY_NAME=")]  # fmt: skip
    return " ".join([*names, *([found["os"]] if found.get("os") else [])]) or None


def _mhz(khz: str | None) -> float | None:
    return int(khz) / 1000 if khz and khz.isdigit() else None


def _scaled(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit
