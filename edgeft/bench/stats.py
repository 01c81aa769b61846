"""How sure a figure is: 95% intervals of proportions, means and scores over n test rows.

B resamples, n rows, L labels. A triple is (value, low, high).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Triple = tuple[float, float, float]
Array = NDArray[np.float64]

Z_95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 1000
SEED = 0


def wilson(successes: int, n: int) -> Triple:
    """A proportion with its Wilson score interval (Wilson 1927), which stays inside [0, 1]."""
    if n <= 0:
        raise ValueError("a proportion needs n > 0")
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def bootstrap_mean(values: ArrayLike) -> Triple:
    """Mean with a percentile bootstrap interval."""
    values_n = np.asarray(values, np.float64)
    counts_Bn = _resample_counts(values_n.size)
    return _triple(float(values_n.mean()), counts_Bn @ values_n / values_n.size)


def bootstrap_ratio(above: ArrayLike, below: ArrayLike) -> Triple:
    """sum(above) / sum(below) over the same rows (paired), for example one model's hits over another's.

    Raises ValueError if the sum below is 0; resamples in which it is 0 are left out.
    """
    above_n, below_n = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if above_n.shape != below_n.shape or below_n.sum() == 0:
        raise ValueError("a ratio needs the same rows on both sides and something below the line")
    counts_Bn = _resample_counts(below_n.size)
    below_B = counts_Bn @ below_n
    kept = below_B > 0
    return _triple(float(above_n.sum() / below_n.sum()), (counts_Bn @ above_n)[kept] / below_B[kept])


def bootstrap_perplexity(nll_sums: ArrayLike, num_tokens: ArrayLike) -> Triple:
    """exp(total negative log-likelihood / total tokens), resampled by row."""
    value, low, high = bootstrap_ratio(nll_sums, num_tokens)
    return float(np.exp(value)), float(np.exp(low)), float(np.exp(high))


def bootstrap_macro_f1(gold: Sequence[str], predicted: Sequence[str | None]) -> Triple:
    """Mean F1 over the labels that occur in `gold`; None (no label given) is wrong for every label."""
    labels = sorted(set(gold))
    gold_nL = np.array([[g == label for label in labels] for g in gold], np.float64)
    predicted_nL = np.array([[p == label for label in labels] for p in predicted], np.float64)
    ones = np.ones((1, len(gold)))
    value = _macro_f1(ones, gold_nL, predicted_nL)[0]
    return _triple(float(value), _macro_f1(_resample_counts(len(gold)), gold_nL, predicted_nL))


def bootstrap_ece(chances: Sequence[float], hits: Sequence[bool], bins: int) -> Triple:
    """Expected calibration error: |confidence - share right|, averaged over bins of equal width by their rows."""
    chances_n, hits_n = np.asarray(chances, np.float64), np.asarray(hits, np.float64)
    at_n = np.minimum((chances_n * bins).astype(int), bins - 1)
    gap_nK = (chances_n - hits_n)[:, None] * (at_n[:, None] == np.arange(bins))
    value = np.abs(gap_nK.sum(axis=0)).sum() / chances_n.size
    resampled_B = np.abs(_resample_counts(chances_n.size) @ gap_nK).sum(axis=1) / chances_n.size
    return _triple(float(value), resampled_B)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of `only_first` rows that the first alone has right and `only_second` that the second alone has.

    The exact test (McNemar 1947, binomial): under the hypothesis that both are equally good, each row on which they
    differ goes either way with probability one half.
    """
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return float(min(1.0, 2 * tail / (1 << differing)))


def bootstrap_difference(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None) -> Triple:
    """Weighted mean of second - first over the same rows (paired), with a percentile bootstrap interval."""
    first_n, second_n = np.asarray(first, np.float64), np.asarray(second, np.float64)
    weights_n = np.ones_like(first_n) if weights is None else np.asarray(weights, np.float64)
    difference_n = (second_n - first_n) * weights_n
    counts_Bn = _resample_counts(first_n.size)
    return _triple(float(difference_n.sum() / weights_n.sum()), (counts_Bn @ difference_n) / (counts_Bn @ weights_n))


def bootstrap_median(values: ArrayLike) -> Triple:
    """Median with a percentile bootstrap interval."""
    values_n = np.asarray(values, np.float64)
    rng = np.random.default_rng(SEED)
    return _triple(float(np.median(values_n)), np.median(rng.choice(values_n, (RESAMPLES, values_n.size)), axis=1))


def median_ratio(first: ArrayLike, second: ArrayLike) -> Triple:
    """median(second) / median(first) of two sets of repeats, with a percentile bootstrap interval."""
    first_n, second_n = np.asarray(first, np.float64), np.asarray(second, np.float64)
    rng = np.random.default_rng(SEED)
    tops = np.median(rng.choice(second_n, (RESAMPLES, second_n.size)), axis=1)
    feet = np.median(rng.choice(first_n, (RESAMPLES, first_n.size)), axis=1)
    return _triple(float(np.median(second_n) / np.median(first_n)), tops / feet)


def _macro_f1(counts_Bn: Array, gold_nL: Array, predicted_nL: Array) -> Array:
    """[B] F1 = 2 TP / (gold + predicted) per label, averaged over the labels that the resample's gold holds."""
    hits_BL = counts_Bn @ (gold_nL * predicted_nL)
    gold_BL = counts_Bn @ gold_nL
    sum_BL = gold_BL + counts_Bn @ predicted_nL
    f1_BL = np.where(gold_BL > 0, 2 * hits_BL / np.maximum(sum_BL, 1), 0.0)
    macro_B: Array = f1_BL.sum(axis=1) / (gold_BL > 0).sum(axis=1)
    return macro_B


def _resample_counts(n: int) -> Array:
    """[B, n] how often each row stands in each resample. Every score here is a function of weighted sums."""
    if n == 0:
        raise ValueError("a bootstrap needs at least one row")
    rng = np.random.default_rng(SEED)
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def _triple(value: float, resampled_B: Array) -> Triple:
    low, high = np.percentile(resampled_B, [2.5, 97.5])
    return value, float(low), float(high)
