"""Losses on the trained positions only: N positions, V vocabulary entries, K kept teacher tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from edgeft.tune.batches import Batch
from edgeft.tune.kernels import ROWS_ATTENTION, Layout

HEAD_ROWS = 128  # positions whose logits are there at once: enough for fast products, 25 MB of 49,152 float32 each
CHUNK_ROWS = 16  # positions per pass: 16 x 49,152 float32 logits are 3 MB, which a processor's caches hold
TINY = 1e-7  # smallest tail probability: a difference to one, exact to float32's last digit
LEAST = 1e-30  # smallest probability of a kept token: keeps the logarithm and its gradient finite


class TeacherTopK(NamedTuple):
    """The teacher at N positions: K token ids (int64), their log-probabilities, the probability of all others.

    A token of log-probability -inf counts as one of the others: it only fills a place.
    """

    ids_NK: torch.Tensor
    logp_NK: torch.Tensor
    tail_N: torch.Tensor


@dataclass(frozen=True)
class Pass:
    """A batch on its way through a decoder: laid out as its attention wants it, its rows found again in the output."""

    batch: Batch
    own: torch.Tensor  # indices of the M tokens among the batch's [B * T] places
    in_rows: bool  # one sequence without padding between the rows, as `rows_attention` takes it

    @staticmethod
    def of(model: Any, batch: Batch) -> Pass:
        own = batch.attention_BT.flatten().nonzero().squeeze(1)
        return Pass(batch, own, model.config._attn_implementation == ROWS_ATTENTION)

    @property
    def at_N(self) -> torch.Tensor:
        """Index among the rows' own tokens of each position that predicts a trained token."""
        return torch.searchsorted(self.own, self.batch.at_N)

    def run(self, decoder: Any) -> torch.Tensor:
        """The last hidden states, of all places."""
        batch, shared = self.batch, len(self.batch.prefix_P)
        if self.in_rows:
            layout = Layout.of(shared, batch.lengths)
            ids = torch.cat([batch.prefix_P, batch.ids_BT.flatten()[self.own], self.own.new_zeros(layout.filling)])
            starts = [(0, shared), *((shared, n) for n in batch.lengths), (0, layout.filling)]
            positions = torch.cat([torch.arange(start, start + n) for start, n in starts])
            settings = {"position_ids": positions[None], "layout": layout}
            out: torch.Tensor = decoder(ids[None], use_cache=False, **settings).last_hidden_state
            return out
        rows = len(batch.ids_BT)
        ids_BT = torch.cat([batch.prefix_P.expand(rows, -1), batch.ids_BT], 1)
        attention_BT = torch.cat([batch.attention_BT.new_ones(rows, shared), batch.attention_BT], 1)
        out = decoder(ids_BT, attention_BT, use_cache=False).last_hidden_state
        return out

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Of what any layer gave for all places, the part of the rows' own tokens, one row after the other: [M, C]."""
        shared = len(self.batch.prefix_P)
        if self.in_rows:
            return states[0, shared : shared + len(self.own)]
        return states[:, shared:].flatten(0, 1).index_select(0, self.own)


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits [N, V] at the positions that predict a trained token; the head runs nowhere else."""
    logits_NV: torch.Tensor = model.get_output_embeddings()(answer_states(model, batch))
    return logits_NV


def answer_states(model: Any, batch: Batch) -> torch.Tensor:
    """What goes into the output head at these positions, [N, C]."""
    way = Pass.of(model, batch)
    return way.tokens(way.run(model.get_decoder())).index_select(0, way.at_N)


@dataclass(frozen=True)
class Distance:
    """How far a student's probabilities q are from the teacher's p: which divergence, at which temperature.

    forward_kl: KL(p || q) (Hinton et al. 2015, arXiv:1503.02531). reverse_kl: KL(q || p) (Gu et al. 2023,
    arXiv:2306.08543). js: half KL(p || m) and half KL(q || m), m halfway between. skewed_kl: KL(p || skew p + (1 -
    skew) q) (Ko et al. 2024, arXiv:2402.03898). At a temperature T the logits of both are divided by T and the
    divergence is multiplied by T squared (Hinton et al.); the teacher's probabilities must have been taken at T.
    """

    kind: Literal["forward_kl", "reverse_kl", "js", "skewed_kl"] = "forward_kl"
    skew: float = 0.1
    temperature: float = 1.0

    def of(self, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each bucket's part of the divergence, and its derivative by q, in the shape of p and q, both above zero."""
        if self.kind == "reverse_kl":
            ratio = (q / p).log()
            return q * ratio, ratio + 1
        if self.kind == "js":
            middle = (p + q) / 2
            return (p * (p / middle).log() + q * (q / middle).log()) / 2, (q / middle).log() / 2
        skew = self.skew if self.kind == "skewed_kl" else 0.0
        mixed = skew * p + (1 - skew) * q
        return p * (p / mixed).log(), (skew - 1) * p / mixed


class _AnswerLoss(torch.autograd.Function):
    """The summed loss of `answer_loss` with its gradient, in chunks of rows that stay in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        labels_N: torch.Tensor,
        teacher: TeacherTopK | None,
        weight: float,
        distance: Distance,
    ) -> torch.Tensor:
        gradient_NV = logits_NV.clone()
        ctx.save_for_backward(gradient_NV)
        return _into_gradient(gradient_NV, labels_N, teacher, weight, distance)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        scale = outer[0].item()
        return gradient_NV if scale == 1 else gradient_NV.mul_(scale), None, None, None, None


class _HeadLoss(torch.autograd.Function):
    """The same from the states [N, C] in front of the output head, some positions at a time: their logits are never
    there all at once."""

    @staticmethod
    def forward(
        ctx: Any,
        states_NC: torch.Tensor,
        head_VC: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        teacher: TeacherTopK | None,
        weight: float,
        distance: Distance,
    ) -> torch.Tensor:
        total = states_NC.new_zeros((), dtype=torch.float64)
        to_states = torch.empty_like(states_NC)
        to_head = torch.zeros_like(head_VC) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        room_NV = states_NC.new_empty(min(HEAD_ROWS, len(states_NC)), len(head_VC))
        for start in range(0, len(labels_N), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            states, targets = states_NC[part], teacher and TeacherTopK(*(t[part] for t in teacher))
            logits = torch.mm(states, head_VC.t(), out=room_NV[: len(states)])
            if bias_V is not None:
                logits += bias_V
            total += _into_gradient(logits, labels_N[part], targets, weight, distance)
            torch.mm(logits, head_VC, out=to_states[part])
            if to_head is not None:
                to_head.addmm_(logits.t(), states)
            if to_bias is not None:
                to_bias += logits.sum(0)
        ctx.gradients = to_states, to_head, to_bias
        return total.to(torch.promote_types(states_NC.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = outer[0].item()
        return *(g if g is None or scale == 1 else g.mul_(scale) for g in ctx.gradients), None, None, None, None


def _into_gradient(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, teacher: TeacherTopK | None, weight: float, distance: Distance
) -> torch.Tensor:
    """The loss summed over N; its gradient takes the place of the logits, chunk by chunk."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    total = logits_NV.new_zeros((), dtype=torch.float64)
    for start in range(0, len(labels_N), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        targets = TeacherTopK(*(t[part] for t in teacher)) if teacher and weight else None
        logits = logits_NV[part].to(wide)
        total += _chunk_into_gradient(logits, labels_N[part, None], targets, weight, distance)
        if logits_NV.dtype != wide:
            logits_NV[part] = logits
    return total.to(wide)


def _chunk_into_gradient(
    logits_NV: torch.Tensor, labels_N1: torch.Tensor, teacher: TeacherTopK | None, weight: float, distance: Distance
) -> torch.Tensor:
    """The same of one chunk, in float32 at least; every pass over [N, V] costs."""
    softness = distance.temperature if teacher else 1.0
    if teacher and softness != 1 and weight < 1:  # two softmaxes
        softer_NV = logits_NV.clone()
        of_labels = _chunk_into_gradient(logits_NV, labels_N1, None, 0.0, distance)
        of_teacher = _chunk_into_gradient(softer_NV, labels_N1, teacher, 1.0, distance)
        logits_NV.mul_(1 - weight).add_(softer_NV, alpha=weight)
        return (1 - weight) * of_labels + weight * of_teacher
    if softness != 1:
        logits_NV.div_(softness)
    by_labels = 1 - weight if teacher else 1.0
    of_label = logits_NV.gather(1, labels_N1)
    of_kept = logits_NV.gather(1, teacher.ids_NK) if teacher else of_label
    top = logits_NV.amax(1, keepdim=True)
    exp_NV = logits_NV.sub_(top).exp_()
    exp_sum = exp_NV.sum(1, keepdim=True)
    log_sum = exp_sum.log() + top
    loss = by_labels * (log_sum - of_label).sum()
    if teacher is None:
        exp_NV.div_(exp_sum)
    else:
        log_q = of_kept - log_sum
        apart, of_others, to_kept = _divergence(log_q, teacher, distance)
        loss += weight * apart
        exp_NV.mul_((by_labels + weight * of_others) / exp_sum)
        exp_NV.scatter_(1, teacher.ids_NK, by_labels * log_q.exp() + weight * to_kept)
    if by_labels:
        exp_NV.scatter_add_(1, labels_N1, exp_NV.new_full(labels_N1.shape, -by_labels))
    return loss


def _divergence(
    log_q_kept: torch.Tensor, teacher: TeacherTopK, distance: Distance
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The divergence summed over N, from the student's log-probabilities [N, K] of the kept tokens.

    And its gradient to the logits: for all other tokens what their probability is multiplied by [N, 1], for the kept
    ones the gradient itself [N, K]. The divergence knows K + 1 buckets, the kept tokens and all others together. With s
    its derivative by a bucket's probability, the gradient to a logit is q (s - the mean of s under q), with s of the
    token's bucket.
    """
    log_p, tail, softness = teacher.logp_NK, teacher.tail_N, distance.temperature
    fills = ~log_p.isfinite()  # a place that only fills up counts for nothing: its token is one of the others
    q_kept = log_q_kept.exp()
    q_tail = (1 - q_kept.masked_fill(fills, 0).sum(1, keepdim=True)).clamp_min(TINY)
    p = torch.cat([log_p.exp().clamp_min(LEAST), tail[:, None].clamp_min(TINY)], 1).to(q_kept.dtype)
    q = torch.cat([q_kept.masked_fill(fills, 1).clamp_min(LEAST), q_tail], 1)
    parts, s = distance.of(p, q)
    parts[:, :-1].masked_fill_(fills, 0)
    s_of_kept = torch.where(fills, s[:, -1:], s[:, :-1])
    mean = (q[:, :-1].masked_fill(fills, 0) * s[:, :-1]).sum(1, keepdim=True) + q_tail * s[:, -1:]
    # T squared for the loss, one of them for the division of the logits
    return parts.sum() * softness**2, (s[:, -1:] - mean) * softness, q_kept * (s_of_kept - mean) * softness


def answer_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    teacher: TeacherTopK | None = None,
    weight: float = 0.0,
    distance: Distance = Distance(),
) -> torch.Tensor:
    """Summed over the positions: (1 - weight) cross-entropy on the labels + weight divergence from the teacher, nats.

    The divergence runs over the teacher's top-k tokens and one bucket for all others: a lower bound of the full one,
    exact when the student spreads its tail as the teacher does (the log-sum inequality; Cover & Thomas, Elements of
    Information Theory, 2.7.1). The gradient is computed here, in few passes over the logits.
    """
    loss: torch.Tensor = _AnswerLoss.apply(logits_NV, labels_N, teacher, weight, distance)  # type: ignore[no-untyped-call]
    return loss


def batch_loss(
    model: Any,
    batch: Batch,
    teacher: TeacherTopK | None = None,
    weight: float = 0.0,
    distance: Distance = Distance(),
    end_id: int | None = None,
) -> torch.Tensor:
    """`answer_loss` at the positions that predict a trained token, without all of their logits in memory.

    `end_id` ends the vocabulary where the model's output is wider.
    """
    states_NC, head = answer_states(model, batch), model.get_output_embeddings()
    if type(head) is not nn.Linear:  # an adapter in it
        return answer_loss(head(states_NC)[:, :end_id], batch.labels_N, teacher, weight, distance)
    narrower = end_id is not None and end_id < head.out_features
    weight_VC, bias_V = (side[:end_id] if narrower and side is not None else side for side in (head.weight, head.bias))
    loss: torch.Tensor = _HeadLoss.apply(states_NC, weight_VC, bias_V, batch.labels_N, teacher, weight, distance)  # type: ignore[no-untyped-call]
    return loss
