"""Inner matching: the student's hidden states and attention are drawn to those of the teacher, which is in memory.

M own tokens of a batch's rows, N trained positions, C and D widths of student and teacher, A relation heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgeft.tune.batches import Batch
from edgeft.tune.losses import Pass

SIDES = ("q_proj", "k_proj", "v_proj")


class FeatureMatching(nn.Module):
    """What the student should look like inside, and the projections that are learned to compare the two.

    Layers are matched evenly: the student's layer i of S with the teacher's layer that stands as deep, (i + 1) T / S.
    """

    def __init__(self, student: Any, teacher: Any, hidden_weight: float, attention_weight: float) -> None:
        super().__init__()
        self._weights = hidden_weight, attention_weight
        self._models = student, teacher.requires_grad_(False).eval()  # in a tuple: they are not this module's own
        layers = [len(model.get_decoder().layers) for model in self._models]
        deep = [max(1, round((i + 1) * layers[1] / layers[0])) - 1 for i in range(layers[0])]
        self._pairs = list(enumerate(deep))
        self._seen, self._wanted = _Watch(student, range(layers[0])), _Watch(teacher, deep)
        width, wanted = (model.config.hidden_size for model in self._models)
        like = next(student.parameters())
        self.projections = nn.ModuleList()
        for _ in self._pairs if hidden_weight else ():
            projection = nn.Linear(width, wanted, bias=False, device=like.device, dtype=like.dtype)
            nn.init.eye_(projection.weight)
            self.projections.append(projection)

    def loss(self, batch: Batch, teacher_batch: Batch) -> torch.Tensor:
        """Summed over the trained positions, so that it adds to `answer_loss`, after the student's pass over `batch`.

        `teacher_batch` is the batch in the teacher's token ids, with the same tokens in the same places.
        """
        student, teacher = self._models
        mine, theirs = Pass.of(student, batch), Pass.of(teacher, teacher_batch)
        with torch.no_grad():
            theirs.run(teacher.get_decoder())
        seen, shown = self._seen.taken(), self._wanted.taken()
        hidden_weight, attention_weight = self._weights
        total = torch.zeros((), device=mine.own.device)
        if hidden_weight:
            apart = [
                hidden_distance(
                    projection(mine.tokens(seen.hidden[s]).index_select(0, mine.at_N)),
                    theirs.tokens(shown.hidden[t]).index_select(0, theirs.at_N),
                )
                for projection, (s, t) in zip(self.projections, self._pairs, strict=True)
            ]
            total = total + hidden_weight * torch.stack(apart).mean()
        if attention_weight:
            heads = math.gcd(*(model.config.num_key_value_heads for model in self._models))
            apart = [
                relation_distance(mine.tokens(seen.sides[side]), theirs.tokens(shown.sides[side]), batch.lengths, heads)
                for side in SIDES
            ]
            total = total + attention_weight * torch.stack(apart).mean() * len(batch.at_N)
        return total


def hidden_distance(student_ND: torch.Tensor, teacher_ND: torch.Tensor) -> torch.Tensor:
    """Squared distance in units of the teacher's mean square, summed over N.

    Jiao et al. 2020, arXiv:1909.10351, equation 8, with the scale of each layer divided out.
    """
    wanted = teacher_ND.float()
    return (student_ND.float() - wanted).square().mean(1).sum() / wanted.square().mean().clamp_min(1e-12)


def relation_distance(
    student_MC: torch.Tensor, teacher_MD: torch.Tensor, lengths: Sequence[int], heads: int
) -> torch.Tensor:
    """KL(teacher || student) of how the tokens of a row relate to those before them, mean over heads and tokens.

    The relation of a token's query (or key, or value) to those of its row is a softmax of scaled dot products, over
    `heads` slices of the width, which need not be the model's heads: Wang et al. 2021, arXiv:2012.15828.
    """
    total = torch.zeros((), device=student_MC.device)
    for mine, theirs in zip(student_MC.split(list(lengths)), teacher_MD.split(list(lengths)), strict=True):
        log_q, log_p = (_relation(side.float(), heads) for side in (mine, theirs))
        total = total + F.kl_div(log_q, log_p, reduction="none", log_target=True).nan_to_num(0.0).sum() / heads
    return total / sum(lengths)


def _relation(tokens_TC: torch.Tensor, heads: int) -> torch.Tensor:
    """Log-probabilities [A, T, T]; minus infinity for tokens that come later."""
    split_ATD = tokens_TC.unflatten(1, (heads, -1)).transpose(0, 1)
    scores = split_ATD @ split_ATD.transpose(1, 2) / math.sqrt(split_ATD.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    relation: torch.Tensor = scores.masked_fill(later, -torch.inf).log_softmax(-1)
    return relation


@dataclass
class _States:
    """What some layers gave, by their number, and the queries, keys and values of the last of them."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    sides: dict[str, torch.Tensor] = field(default_factory=dict)


class _Watch:
    """Keeps the states of a model's latest pass until they are taken."""

    def __init__(self, model: Any, layers: Iterable[int]) -> None:
        self._states, stack = _States(), model.get_decoder().layers
        for layer in sorted(set(layers)):
            stack[layer].register_forward_hook(self._keeper("hidden", layer))
        for side in SIDES:
            getattr(stack[layer].self_attn, side).register_forward_hook(self._keeper("sides", side))

    def _keeper(self, kind: str, name: int | str) -> Any:
        def keep(_: nn.Module, __: Any, out: Any) -> None:
            getattr(self._states, kind)[name] = out[0] if isinstance(out, tuple) else out

        return keep

    def taken(self) -> _States:
        states, self._states = self._states, _States()
        return states


def in_teacher_ids(batch: Batch, teacher_ids: torch.Tensor | None) -> Batch:
    """The batch with the teacher's token ids; `teacher_ids[i]` is the teacher's id of the student's token i."""
    if teacher_ids is None:
        return batch
    return replace(batch, prefix_P=teacher_ids[batch.prefix_P], ids_BT=teacher_ids[batch.ids_BT])
