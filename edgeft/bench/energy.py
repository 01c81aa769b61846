"""Energy while something is timed, from the processor's counters or the battery's gauge, where the machine has them.

RAPL counters: https://docs.kernel.org/power/powercap/powercap.html; batteries: Linux' power_supply class.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise, starmap
from pathlib import Path
from statistics import median

SYSFS = Path("/sys/class")
DOMAINS = "intel-rapl:?"  # whole processors (AMD's too); their parts have a second number
PLATFORM = "psys"  # beside them on laptops: all of the board, the processors once more
NO_METER = "this machine has no energy counter (powercap) and runs on no battery that tells its power"
NOT_ALLOWED = "the energy counters below {folder} may be read by root alone"
NO_TIME = "too short to be read from the energy counters"


class Refused(Exception):
    """Why energy cannot be read."""


@dataclass
class Meter:
    """Power in watts between looks; a look is taken before and after what is measured, and may be taken in between."""

    sysfs: Path = SYSFS
    clock: Callable[[], float] = time.monotonic
    _counters: list[tuple[float, dict[Path, int]]] = field(default_factory=list)  # seconds, microjoules
    _gauge: list[float] = field(default_factory=list)  # watts
    _absent: str = ""

    def look(self) -> None:
        """Read whatever there is; a battery where the counters are kept from this user, as on most laptops."""
        try:
            counters = self._read_counters()
        except Refused as error:
            counters, self._absent = {}, str(error)
        if counters:
            self._counters.append((self.clock(), counters))
        elif (watts := self._read_gauge()) is not None:
            self._gauge.append(watts)

    def watts(self) -> float:
        """Mean power between the first and the last look at the counters, or the median of the gauge's.

        Raises Refused with the reason if neither could be read.
        """
        if not (self._counters or self._gauge):
            raise Refused(self._absent or NO_METER)
        if self._gauge:
            return median(self._gauge)
        joules = sum(starmap(self._spent, pairwise(self._counters)))
        seconds = self._counters[-1][0] - self._counters[0][0]
        if not joules or not seconds:
            raise Refused(NO_TIME)
        return joules / seconds

    def _spent(self, before: tuple[float, dict[Path, int]], after: tuple[float, dict[Path, int]]) -> float:
        """Joules of all domains; a counter that has begun again went through its range once."""
        total = 0
        for domain, end in after[1].items():
            spent = end - before[1].get(domain, end)
            total += spent if spent >= 0 else spent + int((domain / "max_energy_range_uj").read_text("ascii"))
        return total * 1e-6

    def _read_counters(self) -> dict[Path, int]:
        folder = self.sysfs / "powercap"
        try:
            packages = [domain for domain in sorted(folder.glob(DOMAINS)) if not _is_platform(domain)]
            return {domain: int((domain / "energy_uj").read_text("ascii")) for domain in packages}
        except PermissionError:
            raise Refused(NOT_ALLOWED.format(folder=folder)) from None
        except (OSError, ValueError):
            return {}

    def _read_gauge(self) -> float | None:
        """Watts that the battery gives; None while it charges, since then they say nothing of the machine."""
        for supply in sorted((self.sysfs / "power_supply").glob("*")):
            try:
                if (supply / "type").read_text("ascii").strip() != "Battery":
                    continue
                if (supply / "status").read_text("ascii").strip() != "Discharging":
                    continue
                if (supply / "power_now").is_file():
                    return int((supply / "power_now").read_text("ascii")) * 1e-6
                current, voltage = (int((supply / name).read_text("ascii")) for name in ("current_now", "voltage_now"))
                return abs(current) * 1e-6 * voltage * 1e-6
            except (OSError, ValueError):
                continue
        return None


def _is_platform(domain: Path) -> bool:
    name = domain / "name"
    return name.is_file() and name.read_text("ascii").strip() == PLATFORM
