"""Waiting until a device is cool enough to be measured, and what its state says about the timings afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeft.bench.conditions import CLOCK_DROP
from edgeft.progress import Reporter

Facts = dict[str, Any]

LONGEST_S, EVERY_S = 180.0, 10.0
BATTERY_C = 38.0  # phones begin to slow down from about 40
SLOWS_C = 80.0  # a Raspberry Pi does from here
ZONE_C = SLOWS_C - 15  # before it is timed: that adds some 10 to 15
SEVERITY = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")  # Android's thermal status


def too_hot(facts: Facts) -> str | None:
    """What is too hot, in words; None if nothing is, or nothing tells."""
    status = (facts.get("thermal") or {}).get("status") or 0
    if status > 0:
        return f"thermal status {SEVERITY[min(status, len(SEVERITY) - 1)]}"
    battery, zone = (facts.get("battery") or {}).get("temperature_c"), facts.get("temperature_c")
    if battery is not None and battery >= BATTERY_C:
        return f"battery at {battery:.0f} C"
    if battery is None and zone is not None and zone >= ZONE_C:
        return f"hottest zone at {zone:.0f} C"
    return None


def cooled(
    probe: Callable[[], Facts],
    report: Reporter,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Facts:
    """The device's facts as soon as it is cool, or after three minutes."""
    facts, start = probe(), clock()
    if what := too_hot(facts):
        report.note(f"waiting for it to cool down: {what}")
    while too_hot(facts) and clock() - start < LONGEST_S:
        sleep(EVERY_S)
        facts = probe()
    return facts


def heat_marks(before: Facts, after: Facts) -> list[str]:
    """What makes timings doubtful: it was hot, or it says that it slowed itself down."""
    marks = [f"hot: {what} before the measurement"] if (what := too_hot(before)) else []
    thermal = after.get("thermal") or {}
    status = thermal.get("status") or 0
    if thermal.get("throttled") or status > 1:
        named = f"thermal status {SEVERITY[min(status, len(SEVERITY) - 1)]}" if status else "it says so"
        marks.append(f"throttling: {named} after the measurement")
    return marks


def state_marks(after: Facts, trace: Sequence[Mapping[str, Any]]) -> list[str]:
    """What else makes them doubtful: clocks that fell and heat between repeats (`trace` is the runner's), the screen.

    Zones count where no battery tells its heat, as in `too_hot`: parts of a phone's chip may be hotter than all of it.
    """
    marks = []
    clocks = [max(known) for at in trace if (known := [mhz for mhz in at["clocks_mhz"].values() if mhz])]
    if clocks and min(clocks) < (1 - CLOCK_DROP) * max(clocks):
        marks.append(f"throttling: the fastest clock was between {min(clocks):.0f} and {max(clocks):.0f} MHz")
    zones = [degrees for at in trace for degrees in at["zones_c"].values()]
    battery = (after.get("battery") or {}).get("temperature_c")
    if battery is None and zones and max(zones) >= SLOWS_C:
        marks.append(f"hot: the hottest zone reached {max(zones):.0f} C while it was timed")
    if after.get("screen") in ("off", "locked"):
        marks.append(f"screen {after['screen']}: phones give programs less then")
    return marks
