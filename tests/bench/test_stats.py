from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference
from sklearn.metrics import f1_score

from edgeft.bench.stats import bootstrap_macro_f1, bootstrap_mean, bootstrap_perplexity, bootstrap_ratio, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (270, 300), (1, 3)])
def test_the_wilson_interval_agrees_with_scipy(successes: int, n: int) -> None:
    expected = reference.binomtest(successes, n).proportion_ci(method="wilson")
    value, low, high = wilson(successes, n)
    assert value == successes / n
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)


def test_a_proportion_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n > 0"):
        wilson(0, 0)


def test_macro_f1_agrees_with_sklearn_over_the_gold_labels() -> None:
    gold = ["a", "a", "b", "c", "c", "c"]
    predicted = ["a", "b", "b", "c", "elsewhere", None]
    expected = f1_score(gold, [p or "-" for p in predicted], labels=["a", "b", "c"], average="macro", zero_division=0)
    value, low, high = bootstrap_macro_f1(gold, predicted)
    assert value == pytest.approx(expected)
    assert low < value < high


def test_a_resample_without_a_label_averages_over_the_others() -> None:
    # "b" is missing in about a third of the resamples; it must not count as F1 = 0 there
    value, low, high = bootstrap_macro_f1(["a", "a", "b"], ["a", "a", "b"])
    assert (value, low, high) == (1.0, 1.0, 1.0)


def test_the_interval_of_a_mean_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(50, 10, 400)
    value, low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert low == pytest.approx(value - half, abs=0.2)
    assert high == pytest.approx(value + half, abs=0.2)


def test_intervals_are_the_same_every_time() -> None:
    assert bootstrap_mean([1.0, 2.0, 7.0]) == bootstrap_mean([1.0, 2.0, 7.0])


def test_perplexity_weighs_rows_by_their_tokens() -> None:
    value, low, high = bootstrap_perplexity([1.0, 30.0], [1, 10])
    assert value == pytest.approx(np.exp(31 / 11))
    assert low == pytest.approx(np.exp(1.0))
    assert high == pytest.approx(np.exp(3.0))


def test_a_paired_ratio_of_equal_rows_is_exactly_one() -> None:
    hits = [1, 0, 1, 1, 0, 1]
    assert bootstrap_ratio(hits, hits) == (1.0, 1.0, 1.0)


def test_a_ratio_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="below the line"):
        bootstrap_ratio([1, 1], [0, 0])
