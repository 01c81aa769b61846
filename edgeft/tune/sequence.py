"""Learning a teacher's answers as text, beside the labels (sequence-level: Kim & Rush 2016, arXiv:1606.07947)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeft.text.encode import Encoded
from edgeft.tune.batches import Batch, trained_positions
from edgeft.tune.losses import answer_loss


def mix(rows: Sequence[Encoded], labelled: int, teacher_weight: float) -> tuple[list[Encoded], list[float]]:
    """The rows to learn and the weight of each; the first `labelled` are labels, the others the teacher's answers.

    A kind that counts for nothing is left out. If as many tokens are learned of both kinds, the weights are 1 on
    average.
    """
    if teacher_weight == 1:
        return list(rows[labelled:]), [1.0] * (len(rows) - labelled)
    if teacher_weight == 0:
        return list(rows[:labelled]), [1.0] * labelled
    weights = [2 * (1 - teacher_weight)] * labelled + [2 * teacher_weight] * (len(rows) - labelled)
    return list(rows), weights


def weighted_loss(
    logits_NV: torch.Tensor, batch: Batch, rows: Sequence[Encoded], weights: Sequence[float]
) -> torch.Tensor:
    """Cross-entropy summed over the trained positions of the batch's `rows`, those of each row times its weight."""
    counts = [len(trained_positions(row)) for row in rows]
    parts = zip(logits_NV.split(counts), batch.labels_N.split(counts), weights, strict=True)
    return torch.stack([weight * answer_loss(logits, labels) for logits, labels, weight in parts]).sum()
