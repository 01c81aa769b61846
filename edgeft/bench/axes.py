"""Scales and ticks of a chart: from values to pixels, with round numbers on the axis."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` over the pixels from `start` to `end`, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def fit_scale(values: list[float], start: float, end: float, log: bool = False, zero: bool = False) -> Scale:
    """A scale around `values` with some air; `zero` starts it at 0. One single value gets a range around it."""
    low, high = min(values), max(values)
    if log:
        low, high = max(low, 1e-9), max(high, 1e-9)
        air = max((high / low) ** 0.08, 1.15)
        return Scale(low / air, high * air, start, end, log=True)
    air = (high - (0 if zero else low)) * 0.08 or abs(high) * 0.1 or 1.0
    return Scale(0.0 if zero else low - air, high + air, start, end)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or powers of ten alone over a wide range; others over a narrow range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1, 2, 5) if high / low < 1000 else (1,), (1, 2, 3, 5, 7)):
        ticks = [m * 10.0**p for p in powers for m in marks if low <= m * 10.0**p <= high]
        if len(ticks) >= 3:
            return ticks
    return linear_ticks(low, high, about=4)


def tick_text(value: float) -> str:
    """'0.05', '250', '1,500'."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
