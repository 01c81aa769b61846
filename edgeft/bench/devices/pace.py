"""How fast GGUF packages decode on one target, beside a first one: what `bench.race` says of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeft.bench import speed
from edgeft.bench.devices.cooling import cooled
from edgeft.bench.devices.device import Device, DeviceError, opened
from edgeft.bench.devices.job import Job, SpeedJob
from edgeft.bench.devices.measure import default_threads
from edgeft.bench.race import PROMPT, STEPS, TURNS
from edgeft.progress import Reporter

CHANGED = 0.1  # of the first package's rate, from beginning to end, that is told


class Pace:
    """A target, connected, and the rate of the package that others are compared with."""

    def __init__(self, device: Device, threads: int, reference: Path, near: Path) -> None:
        self.threads = threads
        self._device, self._reference, self._near = device, reference, near
        self._rate = self.rate_of(reference)

    def rate_of(self, package: Path) -> float:
        """Tokens per second, the median of TURNS repeats in one process there."""
        self._device.push({"model.gguf": package})
        asked = SpeedJob([0] * PROMPT, STEPS, TURNS)
        job = Job(self.threads, speed.context_needed(PROMPT, STEPS), speed=asked)
        samples = self._device.run(job, self._near, lambda line: None)["samples"]
        return speed.summarise(samples)["decode_tps"]

    def speedup_of(self, package: Path) -> float:
        """How many times as fast it decodes as the reference did at the beginning."""
        return self.rate_of(package) / self._rate

    def drift(self) -> str | None:
        """A sentence if the reference is no longer as fast as it was."""
        now = self.rate_of(self._reference)
        if abs(now / self._rate - 1) <= CHANGED:
            return None
        return f"doubtful: {self._device.name} decoded at {self._rate:.1f} tokens/s at first and at {now:.1f} at last"


@contextmanager
def pace(target: str, threads: int | None, reference: Path, report: Reporter) -> Iterator[Pace]:
    """On a target as `edgeft bench --target` names it. Raises DeviceError if it cannot be reached or tells no times."""
    with opened(target) as device, TemporaryDirectory(prefix="edgeft-") as near:
        if device.emulated:
            raise DeviceError(f"{device.name} is emulated: its timings say nothing about a device", "name a real one")
        facts = cooled(device.probe, report)
        yield (found := Pace(device, threads or default_threads(facts), reference, Path(near)))
        if doubt := found.drift():
            report.note(doubt)
