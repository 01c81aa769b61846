"""Several lengths and thread counts of one package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeft.bench import sweep
from edgeft.bench.sweep import HEADERS, lines, remarks, thread_counts
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings
from tests.bench.test_worker import QUICK, real_package  # noqa: F401 - a fixture


def test_threads_double_up_to_all_cores() -> None:
    assert [thread_counts(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_each_point_is_measured_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BenchSettings] = []

    def timed(package: Path, settings: BenchSettings, strict: bool, runtime: str | None) -> dict[str, Any]:
        asked.append(settings)
        marks = ["busy: so"] if len(asked) == 2 else []
        return {"load_s": 0.5, "ttft_s": 0.025, "prefill_tps": 1000.0, "decode_tps": 50.0 / len(asked),
                "decode_ms_p99": 21.0, "peak_rss_bytes": 2e8, "marks": marks}  # fmt: skip

    monkeypatch.setattr(sweep, "time_package", timed)
    monkeypatch.setattr(sweep, "physical_cores", lambda: 2)
    found = sweep.sweep(Path("package"), BenchSettings(repeats=3), Reporter("sweep"))
    points = [(s.threads, s.prompt_tokens, s.decode_tokens) for s in asked]
    assert len(points) == len(set(points)) == 2 * len(sweep.PROMPTS) * len(sweep.DECODED)
    assert {threads for threads, *_ in points} == {1, 2} and all(s.repeats == 3 for s in asked)
    cells = list(lines(found))
    assert cells[0] == ["1", "32", "32", "0.50", "25", "1000", "50.0", "21.0", "200"] and len(cells[0]) == len(HEADERS)
    assert [line[0] for line in cells[:3]] == ["1", "1*", "1"] and remarks(found) == ["* busy: so"]
    asked.clear()
    sweep.sweep(Path("package"), BenchSettings(threads=3), Reporter("sweep"))
    assert {s.threads for s in asked} == {3}


def test_longer_prompts_take_longer_to_the_first_token(
    real_package: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "PROMPTS", (8, 256))
    monkeypatch.setattr(sweep, "DECODED", (4,))
    short, long = sweep.sweep(real_package, QUICK.model_copy(update={"threads": 1}), Reporter("sweep"))
    assert short["ttft_s"] < long["ttft_s"] and short["peak_rss_bytes"] > 0
