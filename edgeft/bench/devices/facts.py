"""What is known of a device and its state: the host's facts and what phones and boards tell besides, in one shape."""

from __future__ import annotations

from typing import Any

FIELDS = (
    "cpu",  # name of the CPU or SoC, as str
    "machine",  # "aarch64", "x86_64", "armv7l", "wasm32"
    "model",  # of the device: "Pixel 6a", "Raspberry Pi 5 Model B Rev 1.0"
    "soc",  # "Tensor GS101"
    "cores_physical",
    "cores_logical",
    # [{"cpus": [0, 1, 2, 3], "physical": 4, "part": str or None, "max_mhz": float or None, "mhz", "governor"}, ...]
    "clusters",
    "ram_bytes",
    "ram_free_bytes",
    "disk_free_bytes",  # where the private folder lies
    "load_average",  # of 1, 5 and 15 minutes
    "frequency_mhz",  # of the fastest core, now
    "governor",  # of the fastest core
    "temperature_c",  # of the hottest thermal zone
    "thermal",  # {"status": 0-6 | None (Android's), "zones": {name: degrees C}, "throttled": bool | None}
    "battery",  # {"percent", "temperature_c", "current_ma" (negative: discharging), "voltage_mv", "charging": bool}
    "screen",  # "on", "off", "locked"
    "cpu_features",  # ["asimd", "dotprod", ...]
    "os",
    "python",
    "versions",  # {name: version} of runtimes
)


def make_facts(values: dict[str, Any], reasons: dict[str, str], otherwise: str) -> dict[str, Any]:
    """All fields in order, null where `values` has none, with "absent": the reason of each null (`otherwise` if
    `reasons` gives none). Raises ValueError for a value that is no field."""
    if unknown := set(values) - set(FIELDS):
        raise ValueError(f"no fields of a device: {', '.join(sorted(unknown))}")
    facts = {field: values.get(field) for field in FIELDS}
    absent = {field: reasons.get(field, otherwise) for field in FIELDS if facts[field] is None}
    return {**facts, "absent": absent}
