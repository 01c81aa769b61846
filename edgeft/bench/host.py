"""What machine a measurement was taken on; a fact that cannot be read is null with the reason."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

RUNTIMES = (
    "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "numpy", "tokenizers", "sacrebleu",
    "scikit-learn",
)  # fmt: skip
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def physical_cores() -> int:
    """Physical cores that this process may use: hyper-threads share one, a CPU affinity mask can hide some."""
    cores: int = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, usable))


def peak_rss() -> tuple[int, str]:
    """Largest resident memory of this process so far in bytes, and how it was read.

    Linux' ru_maxrss would not do: a process begins with that of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "VmHWM"
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset), "peak working set"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss"


def host_facts() -> dict[str, Any]:
    """The machine, its load right now and the versions in use. `absent` says why a null is null."""
    absent: dict[str, str] = {}

    def fact(name: str, read: Callable[[], Any], reason: str) -> Any:
        value = read()
        if value is None:
            absent[name] = reason
        return value

    facts = {
        "cpu": fact("cpu", _cpu_model, "the system names no CPU model"),
        "machine": platform.machine(),
        "cores_physical": physical_cores(),
        "cores_logical": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": fact("load_average", load_average, "the system keeps no load average"),
        "frequency_mhz": fact("frequency_mhz", frequency_mhz, "the system does not report the CPU frequency"),
        "governor": fact("governor", _governor, f"{GOVERNOR} cannot be read (virtual machine or no cpufreq)"),
        "temperature_c": fact("temperature_c", temperature_c, "no temperature sensor is readable"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: fact(f"versions.{name}", partial(_version, name), "not installed") for name in RUNTIMES},
    }
    return {**facts, "absent": absent}


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8", errors="replace") if cpuinfo.is_file() else ""
    return cpu_model_of(text) or platform.processor() or None


def cpu_model_of(cpuinfo: str) -> str | None:
    """The CPU's name in the text of /proc/cpuinfo: x86's model name, or the board or SoC that ARM's kernel names."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return None


def load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def frequency_mhz() -> float | None:
    """The clock right now, as far as the system tells."""
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return round(frequency.current, 1) if frequency and frequency.current else None


def _governor() -> str | None:
    return GOVERNOR.read_text("ascii").strip() if os.access(GOVERNOR, os.R_OK) else None


def temperature_c() -> float | None:
    """The hottest sensor."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    readings = [entry.current for entries in sensors.values() for entry in entries if entry.current]
    return max(readings, default=None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
