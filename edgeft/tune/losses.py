"""Losses on the trained positions only: N positions, V vocabulary entries, K kept teacher tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from edgeft.tune.batches import Batch
from edgeft.tune.kernels import ROWS_ATTENTION, Layout

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
    way = Pass.of(model, batch)
    hidden_MC = way.tokens(way.run(model.get_decoder()))
    logits_NV: torch.Tensor = model.get_output_embeddings()(hidden_MC.index_select(0, way.at_N))
    return logits_NV


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
        gradient_NV = torch.empty_like(logits_NV)
        total = logits_NV.new_zeros((), dtype=torch.float64)
        for start in range(0, len(labels_N), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = logits_NV[part].to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
            if teacher is None:
                loss, gradient = _cross_entropy(logits, labels_N[part])
            else:
                loss, gradient = _cross_entropy(logits.clone(), labels_N[part])
                apart, towards = _divergence(logits, TeacherTopK(*(t[part] for t in teacher)), distance)
                loss = (1 - weight) * loss + weight * apart
                gradient.mul_(1 - weight).add_(towards, alpha=weight)
            total += loss
            gradient_NV[part] = gradient
        ctx.save_for_backward(gradient_NV)
        return total.to(torch.promote_types(logits_NV.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(outer[0].to(gradient_NV.dtype)), None, None, None, None


def _cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over N, and its gradient [N, V], in place of the logits."""
    of_label = logits_NV.gather(1, labels_N[:, None])
    q_NV, log_sum = _softmax(logits_NV)
    q_NV.scatter_add_(1, labels_N[:, None], q_NV.new_full((len(labels_N), 1), -1.0))
    return (log_sum - of_label).sum(), q_NV


def _divergence(logits_NV: torch.Tensor, teacher: TeacherTopK, distance: Distance) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over N, and its gradient [N, V], in place of the logits.

    The divergence knows K + 1 buckets, the kept tokens and all others together. With s its derivative by a bucket's
    probability, the gradient to a logit is q (s - the mean of s under q), with s of the token's bucket.
    """
    ids, log_p, tail = teacher
    of_kept = logits_NV.div_(distance.temperature).gather(1, ids)
    q_NV, log_sum = _softmax(logits_NV)
    fills = ~log_p.isfinite()  # a place that only fills up counts for nothing: its token is one of the others
    q_kept = (of_kept - log_sum).exp()
    q_tail = (1 - q_kept.masked_fill(fills, 0).sum(1, keepdim=True)).clamp_min(TINY)
    p = torch.cat([log_p.exp().clamp_min(LEAST), tail[:, None].clamp_min(TINY)], 1).to(q_kept.dtype)
    q = torch.cat([q_kept.masked_fill(fills, 1).clamp_min(LEAST), q_tail], 1)
    parts, s = distance.of(p, q)
    parts[:, :-1].masked_fill_(fills, 0)
    s_of_kept = torch.where(fills, s[:, -1:], s[:, :-1])
    mean = (q[:, :-1].masked_fill(fills, 0) * s[:, :-1]).sum(1, keepdim=True) + q_tail * s[:, -1:]
    softened = distance.temperature  # T squared for the loss, one of them for the division of the logits
    q_NV.mul_((s[:, -1:] - mean) * softened).scatter_(1, ids, q_kept * (s_of_kept - mean) * softened)
    return parts.sum() * softened**2, q_NV


def _softmax(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, in place of the logits, and the log of the sum [N, 1]; every pass over [N, V] costs."""
    top = logits_NV.amax(1, keepdim=True)
    exp = logits_NV.sub_(top).exp_()
    exp_sum = exp.sum(1, keepdim=True)
    return exp.div_(exp_sum), exp_sum.log() + top


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
