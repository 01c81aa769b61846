"""Learning a teacher's answers as text, beside the labels (sequence-level: Kim & Rush 2016, arXiv:1606.07947)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeft.text.encode import Encoded
from edgeft.tune.batches import Batch, trained_positions
from edgeft.tune.losses import answer_loss


def mix(rows: Sequence[Encoded], labelled: int, teacher_weight: float) -> tuple[list[Encoded], list[float]]:
    """The rows to learn and the weight of each; the first `labelled` are labels, the others the teacher's answers.

    All tokens of the teacher's answers together weigh `teacher_weight` of the whole, whether they are many or few; a
    token weighs 1 on average. A kind that counts for nothing is left out.
    """
    if teacher_weight == 1:
        return list(rows[labelled:]), [1.0] * (len(rows) - labelled)
    if teacher_weight == 0:
        return list(rows[:labelled]), [1.0] * labelled
    tokens = [sum(row.trained) for row in rows]
    of_labels, of_teacher = sum(tokens[:labelled]), sum(tokens[labelled:])
    label = (1 - teacher_weight) * sum(tokens) / of_labels
    told = teacher_weight * sum(tokens) / of_teacher
    return list(rows), [label] * labelled + [told] * (len(rows) - labelled)


def weighted_loss(
    logits_NV: torch.Tensor, batch: Batch, rows: Sequence[Encoded], weights: Sequence[float]
) -> torch.Tensor:
    """Cross-entropy summed over the trained positions of the batch's `rows`, those of each row times its weight."""
    counts = [len(trained_positions(row)) for row in rows]
    parts = zip(logits_NV.split(counts), batch.labels_N.split(counts), weights, strict=True)
    return torch.stack([weight * answer_loss(logits, labels) for logits, labels, weight in parts]).sum()
