"""Two GGUF packages decode by turns, so that what else the machine does slows both: how many times as fast is one?"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from edgeft.bench.llamacpp import LlamaCppSession

PROMPT, STEPS, TURNS = 32, 24, 7  # tokens before, tokens timed at once, how often


class Racer:
    """A package that decodes on demand."""

    def __init__(self, package: Path, threads: int) -> None:
        self._session = LlamaCppSession(package, threads, context=PROMPT + STEPS)

    def close(self) -> None:
        self._session.close()

    def seconds(self) -> float:
        """For STEPS tokens after a prompt of PROMPT. The token is always the same: which one costs no time."""
        self._session.prefill([0] * PROMPT)
        start = time.perf_counter()
        for _ in range(STEPS):
            self._session.step(0)
        return time.perf_counter() - start

    def speedup_of(self, other: Racer) -> float:
        """How many times as fast the other one is: the median over TURNS, in each of which both take theirs."""
        self.seconds(), other.seconds()  # warm-up
        return statistics.median(self.seconds() / other.seconds() for _ in range(TURNS))


def decode_speedup(reference: Path, other: Path, threads: int) -> float:
    """How many times as fast as `reference` the file `other` decodes."""
    racers = Racer(reference, threads), Racer(other, threads)
    try:
        return racers[0].speedup_of(racers[1])
    finally:
        for racer in racers:
            racer.close()
