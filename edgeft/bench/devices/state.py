"""What a target's row tells of its device and its state while it was measured: lines of text for a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgeft.bench.table import DASH

Row = dict[str, Any]


def state_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Label and one cell a row, for what at least one of them tells; "a, b": before and after it was timed."""
    lines = [[label, *(read(row) or DASH for row in rows)] for label, read in LINES.items()]
    return [line for line in lines if any(text != DASH for text in line[1:])]


def _rows_scored(row: Row) -> str:
    return str(row["n"]) if row["n"] else ""


def _clusters(row: Row) -> str:
    """'4x 1.8 GHz + 2x 2.8 GHz'; a clock that is not known is left out."""
    clusters = (row["device"] or {}).get("clusters") or ()
    clocks = [f" {one['max_mhz'] / 1000:.1f} GHz" if one.get("max_mhz") else "" for one in clusters]
    return " + ".join(f"{len(one['cpus'])}x{clock}" for one, clock in zip(clusters, clocks, strict=True))


def _before_and_after(field: str, tell: Callable[[Any], str]) -> Callable[[Row], str]:
    def read(row: Row) -> str:
        moments = (row["conditions"] or {}).get(field) or ()
        told = [tell(moment) for moment in moments if moment]
        return ", ".join(dict.fromkeys(told))  # once, where nothing changed

    return read


def _battery(battery: dict[str, Any]) -> str:
    parts = [f"{battery['percent']}%" if battery.get("percent") is not None else ""]
    parts += [f"{battery['temperature_c']:g} C" if battery.get("temperature_c") is not None else ""]
    parts += ["charging" if battery.get("charging") else ""]
    return " ".join(filter(None, parts))


def _thermal(thermal: dict[str, Any]) -> str:
    status = thermal.get("status")
    return " ".join(filter(None, (DASH if status is None else str(status), thermal.get("throttled") and "throttled")))


def _wasm(row: Row) -> str:
    memory = (row["conditions"] or {}).get("wasm_memory")
    return f"{memory['bytes'] / 1e6:,.0f}" if memory else ""


def _instructions(row: Row) -> str:
    counted = ((row["conditions"] or {}).get("instructions") or {}).get("decode_per_token")
    return f"{counted / 1e6:,.1f}" if counted is not None else ""


LINES: dict[str, Callable[[Row], str]] = {
    "rows scored": _rows_scored,
    "cores": _clusters,
    "thermal status": _before_and_after("thermal", _thermal),
    "battery": _before_and_after("battery", _battery),
    "screen": _before_and_after("screen", str),
    "WASM MB": _wasm,
    "M instructions/token": _instructions,
}


def without_energy(row: Row) -> str | None:
    """Why a device with a battery has no energy per token."""
    reason = ((row["conditions"] or {}).get("energy") or {}).get("absent")
    return f"{row['target']}: no energy per token: {reason}" if reason else None
