"""How far the predictions of one model are from those of another, position by position.

Letters: P positions, V vocabulary. KL is D(reference || model) in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ParityError
from edgeft.formats.probe import Probe

CHUNK = 64  # positions compared at once, so that memory stays small

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Differences:
    """What is compared at each position."""

    kl_P: NDArray[np.float64]
    same_top_P: NDArray[np.bool_]
    nll_P: NDArray[np.float64]  # of the token that really follows
    nll_reference_P: NDArray[np.float64]


@dataclass(frozen=True)
class Parity:
    """Agreement of a model with its reference."""

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float  # share of positions with the same likeliest token
    perplexity: float
    perplexity_reference: float
    n_positions: int


def compare(reference_PV: Floats, logits_PV: Floats, next_ids_P: NDArray[np.integer]) -> Parity:
    """Compare two models' logits. Raises ParityError if one is not finite."""
    return summarize([differences(reference_PV, logits_PV, next_ids_P)])


def differences(reference_PV: Floats, logits_PV: Floats, next_ids_P: NDArray[np.integer]) -> Differences:
    """Compare at every position. Raises ParityError if the shapes differ or a logit is not finite."""
    if reference_PV.shape != logits_PV.shape:
        raise ParityError(
            f"the model gives logits of shape {logits_PV.shape}, the reference {reference_PV.shape}",
            "compare a package only with the model it was made from",
        )
    parts = [
        _compare(reference_PV[at : at + CHUNK], logits_PV[at : at + CHUNK], next_ids_P[at : at + CHUNK])
        for at in range(0, len(next_ids_P), CHUNK)
    ]
    return _join(parts)


def summarize(parts: Sequence[Differences]) -> Parity:
    """The figures over all positions of all parts. Raises ParityError if there are none."""
    whole = _join(parts)
    if not len(whole.kl_P):
        raise ParityError("there is no position to compare", "the probe needs rows with an answer")
    return Parity(
        kl_mean=float(whole.kl_P.mean()),
        kl_p99=float(np.quantile(whole.kl_P, 0.99)),
        kl_max=float(whole.kl_P.max()),
        top1=float(whole.same_top_P.mean()),
        perplexity=float(np.exp(whole.nll_P.mean())),
        perplexity_reference=float(np.exp(whole.nll_reference_P.mean())),
        n_positions=len(whole.kl_P),
    )


def by_row(
    reference_PV: Floats, logits_PV: Floats, next_ids_P: NDArray[np.integer], lengths: Sequence[int]
) -> list[Differences]:
    """The same for each row; `lengths` are their positions. Raises ParityError as `differences` does."""
    starts = np.cumsum([0, *lengths])
    spans = [slice(*span) for span in itertools.pairwise(starts)]
    return [differences(reference_PV[span], logits_PV[span], next_ids_P[span]) for span in spans]


def worst_row(parts: Sequence[Differences]) -> int:
    """The one with the largest mean KL divergence."""
    return int(np.argmax([part.kl_P.mean() for part in parts]))


def descent(parent: Probe, child: Probe, parent_ids: Sequence[int]) -> dict[int, Differences]:
    """A model against one with other tokens, over the tokens of the child; `parent_ids[i]` is the parent's id of i.

    By row of the probe; rows that the two tokenizers cut differently are left out.
    """
    kept, parts = np.array(parent_ids), dict[int, Differences]()
    next_ids, ours, theirs = child.next_ids(), _starts(child), _starts(parent)
    for row, (ids, at) in enumerate(zip(child.rows, child.positions, strict=True)):
        if row >= len(parent.rows) or kept[ids].tolist() != parent.rows[row] or at != parent.positions[row]:
            continue
        own, other = (slice(start[row], start[row] + len(at)) for start in (ours, theirs))
        reference = np.ascontiguousarray(parent.logits_PV[other][:, kept])
        parts[row] = differences(reference, child.logits_PV[own, : len(kept)], next_ids[own])
    return parts


def _starts(probe: Probe) -> NDArray[np.int64]:
    """Of each row: where its positions start among all."""
    return np.cumsum([0, *map(len, probe.positions)])


def part_at(answer: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two answers differ, or at which one of them ends; None if they are equal."""
    if list(answer) == list(other):
        return None
    shorter = min(len(answer), len(other))
    return next((i for i in range(shorter) if answer[i] != other[i]), shorter)


@dataclass(frozen=True)
class Greedy:
    """Greedy answers of a model beside those of its reference."""

    rows: int
    equal: int
    part_at_median: float | None  # position of the first other token, over the answers that part


def compare_answers(reference: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Greedy:
    """Where answers of the same prompts part."""
    parts = [part_at(a, b) for a, b in zip(reference, answers, strict=True)]
    parted = [at for at in parts if at is not None]
    return Greedy(len(parts), len(parts) - len(parted), float(np.median(parted)) if parted else None)


def _compare(reference_PV: Floats, logits_PV: Floats, next_ids_P: NDArray[np.integer]) -> Differences:
    for name, values in (("the reference", reference_PV), ("the model", logits_PV)):
        if not np.isfinite(values).all():
            raise ParityError(f"{name} gives logits that are not finite", "its weights are damaged or overflow")
    log_p, log_q = _log_softmax(reference_PV), _log_softmax(logits_PV)
    kl_P = np.sum(np.exp(log_p) * (log_p - log_q), axis=1, dtype=np.float64)
    at = np.arange(len(next_ids_P))
    return Differences(
        np.maximum(kl_P, 0),  # rounding can leave a tiny negative sum
        reference_PV.argmax(1) == logits_PV.argmax(1),
        -log_q[at, next_ids_P].astype(np.float64),
        -log_p[at, next_ids_P].astype(np.float64),
    )


def _log_softmax(logits_PV: Floats) -> Floats:
    shifted: Floats = logits_PV - logits_PV.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def _join(parts: Sequence[Differences]) -> Differences:
    return Differences(
        np.concatenate([np.empty(0), *(p.kl_P for p in parts)]),
        np.concatenate([np.empty(0, np.bool_), *(p.same_top_P for p in parts)]),
        np.concatenate([np.empty(0), *(p.nll_P for p in parts)]),
        np.concatenate([np.empty(0), *(p.nll_reference_P for p in parts)]),
    )
