"""What stands beside the figures of several targets: state, energy, instruction counts."""

from __future__ import annotations

from typing import Any

from edgeft.bench.devices.side_by_side import page, remarks, target_table
from edgeft.bench.table import FIELDS

THERE = {"percent": 80, "temperature_c": 31.5, "charging": False}
PHONE = {
    "conditions": {
        "threads": 4,
        "thermal": [{"status": 0, "throttled": False}, {"status": 2, "throttled": True}],
        "battery": [THERE, {**THERE, "percent": 79}],
        "screen": ["on", "on"],
        "energy": {"joules_per_token": 0.0421, "watts": 3.0, "absent": None},
    },
    "device": {
        "clusters": [
            {"cpus": [0, 1, 2, 3], "part": "0xd05", "max_mhz": 1803.0},
            {"cpus": [4, 5], "part": None, "max_mhz": None},
        ]
    },
    "n": 12,
    "joules_per_token": 0.0421,
}
EMULATED = {"conditions": {"threads": 1, "emulated": True, "instructions": {"decode_per_token": 31_200_000.0}}}


def row(target: str, **values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(FIELDS), "target": target, "error": None, "device": None, **values}


def test_the_table_shows_a_phones_state_and_energy_and_the_instructions_of_an_emulated_processor() -> None:
    rows = [row("android:x", **PHONE), row("arm64", **EMULATED), row("ssh:nobody", error="no answer")]
    lines = {line[0]: line[1:] for line in target_table(rows)[1]}
    assert lines["cores"] == ["4x 1.8 GHz + 2x", "—", "—"]
    assert lines["thermal status"][0] == "0, 2 throttled"
    assert lines["battery"][0] == "80% 31.5 C, 79% 31.5 C"
    assert lines["screen"][0] == "on"
    assert lines["J/token"][0] == "0.042"
    assert lines["M instructions/token"] == ["—", "31.2", "—"]
    assert lines["rows scored"] == ["12", "—", "—"]
    assert "<td>80% 31.5 C, 79% 31.5 C</td>" in page(rows)


def test_what_no_target_tells_takes_no_line() -> None:
    lines = [line[0] for line in target_table([row("local", conditions={"threads": 2, "battery": [None, None]})])[1]]
    assert lines == ["runtime", "threads"]


def test_why_a_charging_phone_has_no_energy_is_said() -> None:
    energy = {"joules_per_token": None, "watts": None, "absent": "the phone is charging"}
    [said] = remarks([row("android:x", conditions={"energy": energy})])
    assert said == "android:x: no energy per token: the phone is charging"
