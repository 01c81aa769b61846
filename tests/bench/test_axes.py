from __future__ import annotations

import pytest

from edgeft.bench.axes import Scale, fit_scale, linear_ticks, log_ticks, tick_text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (69, 97.3), (0.013, 0.047), (-3, 12345), (0, 430)])
def test_linear_ticks_are_round_inside_the_range_and_neither_few_nor_many(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert 3 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    steps = {round(b - a, 9) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert len(steps) == 1
    assert f"{steps.pop():.0e}"[0] in "125"


def test_log_ticks_are_ones_twos_and_fives() -> None:
    assert log_ticks(60, 600) == [100, 200, 500]
    assert log_ticks(1e-6, 1) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]
    assert log_ticks(140, 950) == [200, 300, 500, 700]
    assert len(log_ticks(110, 190)) >= 3


def test_a_log_scale_puts_equal_factors_at_equal_distances() -> None:
    scale = Scale(1, 100, 0, 200, log=True)
    assert [scale(v) for v in (1, 10, 100)] == pytest.approx([0, 100, 200])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[5.0], [0.2, 0.2], [1.0, 400.0]])
def test_every_value_lies_inside_its_scale(values: list[float], log: bool) -> None:
    scale = fit_scale(values, 0, 100, log=log)
    assert all(0 < scale(value) < 100 for value in values)


def test_ticks_read_well() -> None:
    assert [tick_text(v) for v in (0.05, 250.0, 1500.0, 0.30000000000000004)] == ["0.05", "250", "1,500", "0.3"]
