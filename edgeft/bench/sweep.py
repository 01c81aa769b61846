"""One package at several lengths and thread counts, each in a fresh process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from edgeft.bench.host import physical_cores
from edgeft.bench.run import time_package
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings

PROMPTS, DECODED = (32, 128, 512), (32, 128)  # tokens
HEADERS = ["threads", "prompt", "generated", "load s", "TTFT ms", "prefill tok/s", "decode tok/s", "p99 ms", "peak MB"]


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4 and so on, and all cores."""
    return sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})


def sweep(
    package: Path, settings: BenchSettings, report: Reporter, runtime: str | None = None, strict: bool = False
) -> list[dict[str, Any]]:
    """Speed and memory of every combination: {"threads", "prompt_tokens", "decode_tokens"} and the figures.

    `settings.threads` leaves that number of threads alone. Raises like `bench_package`.
    """
    threads = [settings.threads] if settings.threads else thread_counts(physical_cores())
    points = list(product(threads, PROMPTS, DECODED))
    found = []
    with report.track("sweep", len(points)) as bar:
        for point in points:
            asked = dict(zip(("threads", "prompt_tokens", "decode_tokens"), point, strict=True))
            found.append({**asked, **time_package(package, settings.model_copy(update=asked), strict, runtime)})
            bar.advance(1)
    return found


def remarks(points: list[dict[str, Any]]) -> list[str]:
    """What makes timings doubtful, in words, each once."""
    return [f"* {mark}" for mark in dict.fromkeys(mark for point in points for mark in point["marks"])]


def lines(points: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Cells under `HEADERS`; a star marks timings that other work disturbed."""
    for point in points:
        yield [
            f"{point['threads']}{'*' if point['marks'] else ''}",
            *(str(point[name]) for name in ("prompt_tokens", "decode_tokens")),
            f"{point['load_s']:.2f}",
            f"{1000 * point['ttft_s']:.0f}",
            f"{point['prefill_tps']:.0f}",
            f"{point['decode_tps']:.1f}",
            f"{point['decode_ms_p99']:.1f}",
            f"{point['peak_rss_bytes'] / 1e6:.0f}",
        ]
