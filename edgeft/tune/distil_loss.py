"""What a step of distilling minimises, whether it learns cached probabilities, texts, or from answers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate
from edgeft.tune.features import FeatureMatching, in_teacher_ids
from edgeft.tune.losses import Distance, TeacherTopK, answer_logits, batch_loss
from edgeft.tune.on_policy import OnPolicy, is_own_turn
from edgeft.tune.sequence import weighted_loss
from edgeft.tune.targets import RowTargets, gather


@dataclass(frozen=True)
class Material:
    """What there is to learn: rows and, for each of them, the teacher's probabilities or how much its text counts."""

    rows: list[Encoded]
    targets: list[RowTargets] | None
    weights: list[float] | None
    prefix: int  # tokens that all rows begin with


@dataclass(frozen=True)
class DistilLoss:
    """The summed loss of some rows, the number of trained tokens and of all tokens, as the training loop takes it."""

    model: Any
    material: Material
    pad_id: int
    end_id: int  # ends the vocabulary where the model's output is wider
    teacher_weight: float
    distance: Distance
    device: torch.device
    live: OnPolicy | None = None
    own_turns: float = 0.0  # share of steps in which the student answers
    inside: FeatureMatching | None = None
    teacher_ids: torch.Tensor | None = None  # of the student's tokens, if they are others

    def __call__(self, numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        return self.on(numbers, is_own_turn(self.own_turns))

    def on(self, numbers: Sequence[int], own_turn: bool) -> tuple[torch.Tensor, int, int]:
        """With or without answers of the student's own."""
        rows, teacher, weight = [self.material.rows[i] for i in numbers], None, self.teacher_weight
        if self.live and own_turn:
            rows, teacher = self.live.ask(rows)
            weight = 1.0  # what the student says is no label
        elif self.material.targets:
            teacher = gather([self.material.targets[i] for i in numbers])
        batch = collate(rows, self.pad_id, self.material.prefix).to(self.device)
        if teacher:
            there = TeacherTopK(*(t.to(self.device) for t in teacher))
            loss = batch_loss(self.model, batch, there, weight, self.distance, self.end_id)
        else:
            logits_NV = answer_logits(self.model, batch)[:, : self.end_id]
            weights = self.material.weights or [1.0] * len(self.material.rows)
            loss = weighted_loss(logits_NV, batch, rows, [weights[i] for i in numbers])
        if self.inside:
            loss = loss + self.inside.loss(batch, in_teacher_ids(batch, self.teacher_ids))
        return loss, len(batch.labels_N), batch.num_tokens
