"""How quiet and steady the machine was while something was measured: what others took, heat, and drift."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from edgeft.bench.host import frequency_mhz, load_average, temperature_c

BUSY_SHARE = 0.10  # of the CPU time of the measured threads, taken by others
DRIFT = 0.10  # by how much the later repeats may be slower than the earlier ones
CLOCK_DROP = 0.10
LOOK_S = 1.0


@dataclass(frozen=True)
class Moment:
    """The state of the machine, and the CPU seconds spent so far by this process and by all."""

    wall_s: float
    own_s: float | None  # None where the system does not tell
    busy_s: float | None
    frequency_mhz: float | None
    temperature_c: float | None
    load_average: list[float] | None


def look() -> Moment:
    """The machine now."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # stands in user and nice already
    own = sum(os.times()[:4])
    return Moment(time.monotonic(), own, sum(times) - idle - guest, frequency_mhz(), temperature_c(), load_average())


def others_share(before: Moment, after: Moment, threads: int) -> float | None:
    """CPU time that other processes, and other guests of the machine, took between two moments, as a share of what the
    measured threads could have had: on many cores one busy process weighs as much as on few."""
    if None in (before.busy_s, after.busy_s, before.own_s, after.own_s):
        return None
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)  # type: ignore[operator]
    return min(1.0, max(0.0, others / max(1e-9, (after.wall_s - before.wall_s) * threads)))


def busy_now(threads: int, seconds: float = LOOK_S) -> float:
    """`others_share` over the next moments, in which this process does nothing."""
    before = look()
    time.sleep(seconds)
    return others_share(before, look(), threads) or 0.0


def drift(samples: Sequence[dict[str, Any]]) -> float:
    """By how much the last third of the repeats, at least two, decodes slower than the first; 0 for fewer than 4."""
    rates = [len(sample["decode_s"]) / sum(sample["decode_s"]) for sample in samples]
    part = max(2, len(rates) // 3)
    return 1 - float(np.median(rates[-part:]) / np.median(rates[:part])) if len(rates) >= 2 * part else 0.0


def describe(before: Moment, after: Moment, samples: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """The conditions as a record; `marks` says in words what makes the timings doubtful, empty if nothing does."""
    share, slower = others_share(before, after, threads), drift(samples)
    marks = []
    if share is not None and share > BUSY_SHARE:
        marks.append(f"busy: others took {share:.0%} of the time of {threads} threads")
    if slower > DRIFT:
        marks.append(f"slowing: the last repeats were {slower:.0%} slower than the first")
    clocks = (before.frequency_mhz, after.frequency_mhz)
    if clocks[0] and clocks[1] and clocks[1] < (1 - CLOCK_DROP) * clocks[0]:
        marks.append(f"throttling: the clock fell from {clocks[0]:.0f} to {clocks[1]:.0f} MHz")
    return {
        "others_share": None if share is None else round(share, 4),
        "drift": round(slower, 4),
        "load_average": [before.load_average, after.load_average],
        "frequency_mhz": list(clocks),
        "temperature_c": [before.temperature_c, after.temperature_c],
        "marks": marks,
    }
