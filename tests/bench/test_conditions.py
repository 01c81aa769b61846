from __future__ import annotations

from typing import Any

import pytest

from edgeft.bench.conditions import Moment, busy_now, describe, drift, look, others_share
from edgeft.bench.footprint import Footprint
from edgeft.bench.machine import best_time, probe
from edgeft.bench.roofline import ceiling


def moment(wall: float = 0.0, own: float = 0.0, busy: float = 0.0, clock: float | None = None) -> Moment:
    return Moment(wall, own, busy, clock, None, None)


def repeats(*rates: float) -> list[dict[str, Any]]:
    return [{"decode_s": [1 / rate] * 4} for rate in rates]


def test_others_are_what_is_busy_and_not_this_process() -> None:
    assert others_share(moment(), moment(10, 8, 9), threads=2) == pytest.approx(0.05)
    assert others_share(moment(), moment(10, 8, 20), threads=2) == pytest.approx(0.6)
    assert others_share(moment(), moment(10, 8, 7.9), threads=2) == 0.0  # clocks tick apart


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert drift(repeats(100, 100, 100, 100, 80, 80)) == pytest.approx(0.2)
    assert drift(repeats(80, 80, 100, 100, 100, 100)) < 0
    assert drift(repeats(100, 100, 90, 80, 80)) == pytest.approx(0.2)  # of five the first two and the last two
    assert drift(repeats(100, 50, 50)) == 0.0


def test_a_quiet_steady_machine_has_no_marks_and_others_say_why() -> None:
    assert describe(moment(), moment(10, 8, 9), repeats(*[100] * 6), 2)["marks"] == []
    marks = describe(moment(clock=3000), moment(10, 8, 20, clock=2400), repeats(100, 100, 90, 90, 80, 80), 2)["marks"]
    assert [mark.partition(":")[0] for mark in marks] == ["busy", "slowing", "throttling"]


def test_the_machine_can_be_looked_at() -> None:
    first, second = look(), look()
    assert second.wall_s >= first.wall_s and second.own_s >= first.own_s > 0 and second.busy_s >= first.busy_s > 0
    assert 0 <= busy_now(1, seconds=0.05) <= 1


def test_the_probe_measures_in_a_process_of_its_own() -> None:
    found = probe(1)
    assert 0.5 < found["read_gbps"] < 5000 and 0.5 < found["gemm_gflops"] < 1e6


def test_the_best_time_is_the_fastest_after_a_warm_up() -> None:
    now = iter([0.0, 0.0, 9.0, 9.0, 11.0, 11.0, 14.0, 14.0])
    done: list[int] = []
    assert best_time(lambda: done.append(1), budget_s=1.0, clock=lambda: next(now)) == 2.0
    assert len(done) == 4


def test_the_ceiling_follows_from_bytes_and_products() -> None:
    package = Footprint(
        format="gguf", layers={"q8_0": 60, "f16": 40}, head={"q8_0": 10}, decode_bytes=100_000_000, resident_bytes=0,
        tied_head_bytes=0, cache_bytes_per_token=0, vocab=1, width=1,
    )  # fmt: skip
    found = ceiling(package, {"read_gbps": 20.0, "gemm_gflops": 1.0}, 10)
    assert found.decode_tps == pytest.approx(200)
    assert found.prefill_tps == pytest.approx(1e9 / (2 * 101))  # the head works once for ten tokens
    shares = found.shares({"decode_tps": 100.0, "prefill_tps": found.prefill_tps / 4})
    assert (shares["bandwidth_share"], shares["gemm_share"]) == (pytest.approx(0.5), pytest.approx(0.25))
    assert "100 MB read per token at 20.0 GB/s give at most 200 tokens/s" in found.text()
