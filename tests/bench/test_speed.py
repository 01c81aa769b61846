from __future__ import annotations

from typing import Any

import pytest

from edgeft.bench.speed import MAX_WARM_UPS, Effort, context_needed, measure, prompt_of_length, summarise

THREE = Effort(repeats=3, seconds=0.0, precision=0.02)


class Clock:
    """A clock that only moves when the session works: 2 s a prefill, 0.1 s a step; argmax is free."""

    def __init__(self, session: Any, slow_step: float = 0.0) -> None:
        self.now, self._session, self._seen, self._slow_step = 0.0, session, 0, slow_step

    def __call__(self) -> float:
        for name, _ in self._session.calls[self._seen :]:
            self.now += {"reset": 50.0, "prefill": 2.0, "step": 0.1 + self._slow_step}[name]
        self._seen = len(self._session.calls)
        return self.now


def test_the_rates_follow_from_the_clock_and_resets_are_not_timed(fake_session: Any) -> None:
    session = fake_session({})
    samples, summary = measure(session, [65] * 20, decode_tokens=8, effort=THREE, clock=Clock(session))
    assert summary["ttft_s"] == pytest.approx(2.0)
    assert summary["prefill_tps"] == pytest.approx(10.0)
    assert summary["decode_tps"] == pytest.approx(10.0)  # 8 steps in 0.8 s: the prefill is not in it
    assert summary["decode_ms_p50"] == pytest.approx(100.0)
    assert [len(sample["decode_s"]) for sample in samples] == [8, 8, 8]


def test_a_warm_up_comes_first_and_is_not_counted(fake_session: Any) -> None:
    session = fake_session({})
    seen = []
    samples, _ = measure(session, [65], 6, THREE, Clock(session), on_repeat=lambda: seen.append(1))
    assert [name for name, _ in session.calls].count(
        "prefill"
    ) == 2 + 3  # the second warm-up shows that the first was steady
    assert len(samples) == 3
    assert len(seen) == 4


class Noise(Clock):
    """Every call takes longer or shorter than the one before, until `calm`."""

    def __init__(self, session: Any, factors: list[float]) -> None:
        super().__init__(session)
        self._factors = factors

    def __call__(self) -> float:
        before = self.now
        prefills = [name for name, _ in self._session.calls].count("prefill")
        now = super().__call__()
        self.now = before + (now - before) * self._factors[min(max(prefills - 1, 0), len(self._factors) - 1)]
        return self.now


def test_the_warm_up_goes_on_while_answers_get_faster(fake_session: Any) -> None:
    session = fake_session({})
    _, summary = measure(session, [65], 4, THREE, Noise(session, [3.0, 2.0, 1.5, 1.0]))
    assert summary["warm_ups"] == 5  # the fifth is no faster than the fourth
    session = fake_session({})
    _, summary = measure(session, [65], 4, THREE, Noise(session, [0.5**i for i in range(20)]))
    assert summary["warm_ups"] == MAX_WARM_UPS


def test_repeats_go_on_until_the_median_is_known_or_the_time_is_over(fake_session: Any) -> None:
    noisy = [1.0, 1.0, *([1.0, 1.3] * 4), *([1.0] * 400)]
    narrow = Effort(repeats=3, seconds=1e9, precision=0.02)
    session = fake_session({})
    _, summary = measure(session, [65], 4, narrow, Noise(session, noisy))
    assert summary["repeats"] > 8 and summary["spread"] <= 0.02
    session = fake_session({})
    _, summary = measure(session, [65], 4, Effort(3, 500.0, 0.02), Noise(session, noisy))
    assert 3 < summary["repeats"] < 12 and summary["spread"] > 0.02


def test_every_step_feeds_the_token_chosen_before(fake_session: Any) -> None:
    session = fake_session({})
    measure(session, [65] * 5, decode_tokens=3, effort=THREE, clock=Clock(session))
    assert [token for name, token in session.calls if name == "step"][-3:] == [5, 6, 7]


def test_medians_ignore_one_slow_repeat_and_p95_shows_it() -> None:
    fast = {"prompt_tokens": 10, "prefill_s": 1.0, "choose_s": 0.0, "decode_s": [0.1] * 10}
    slow = {"prompt_tokens": 10, "prefill_s": 9.0, "choose_s": 0.5, "decode_s": [0.9] * 10}
    summary = summarise([fast, fast, slow])
    assert (summary["ttft_s"], summary["decode_tps"]) == (1.0, pytest.approx(10.0))
    assert summary["decode_ms_p50"] == pytest.approx(100.0)
    assert summary["decode_ms_p95"] == summary["decode_ms_p99"] == pytest.approx(900.0)
    assert summary["decode_ms_p90"] == pytest.approx(900.0)


def test_a_short_prompt_is_repeated_and_a_long_one_cut() -> None:
    assert prompt_of_length([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert prompt_of_length([1, 2, 3], 2) == [1, 2]
    with pytest.raises(ValueError, match="real token"):
        prompt_of_length([], 4)


def test_the_context_holds_prompt_and_answer() -> None:
    assert context_needed(1000, 100) >= 1101
    assert context_needed(8, 8) == 512
