"""Losses on the trained positions only: N positions, V vocabulary entries, K kept teacher tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from edgeft.tune.batches import Batch
from edgeft.tune.kernels import ROWS_ATTENTION, Layout

CHUNK_ROWS = 16  # positions per pass: 16 x 49,152 float32 logits are 3 MB, which a processor's caches hold
TINY = 1e-7  # smallest tail probability of the student: keeps the logarithm and its gradient finite


class TeacherTopK(NamedTuple):
    """The teacher at N positions: K token ids (int64), their log-probabilities, the probability of all others.

    A token of log-probability -inf counts as one of the others: it only fills a place.
    """

    ids_NK: torch.Tensor
    logp_NK: torch.Tensor
    tail_N: torch.Tensor


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits [N, V] at the positions that predict a trained token; the head runs nowhere else."""
    decoder = model.get_decoder()
    rows, shared = len(batch.ids_BT), len(batch.prefix_P)
    at_N = batch.at_N
    if decoder.config._attn_implementation == ROWS_ATTENTION:
        own = batch.attention_BT.flatten().nonzero().squeeze(1)  # one sequence, without padding between the rows
        layout, filling = Layout.of(shared, batch.lengths).filled()
        ids = torch.cat([batch.prefix_P, batch.ids_BT.flatten()[own], own.new_zeros(filling)])
        starts = [(0, shared), *((shared, n) for n in batch.lengths), (0, filling)]
        positions = torch.cat([torch.arange(start, start + n) for start, n in starts])
        hidden = decoder(ids[None], position_ids=positions[None], use_cache=False, layout=layout).last_hidden_state[
            0, shared:
        ]
        at_N = torch.searchsorted(own, at_N)
    else:
        ids_BT = torch.cat([batch.prefix_P.expand(rows, -1), batch.ids_BT], 1)
        attention_BT = torch.cat([batch.attention_BT.new_ones(rows, shared), batch.attention_BT], 1)
        hidden = decoder(ids_BT, attention_BT, use_cache=False).last_hidden_state[:, shared:].flatten(0, 1)
    hidden_NC = hidden.index_select(0, at_N)
    logits_NV: torch.Tensor = model.get_output_embeddings()(hidden_NC)
    return logits_NV


class _AnswerLoss(torch.autograd.Function):
    """The summed loss of `answer_loss` with its gradient, in chunks of rows that stay in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, teacher: TeacherTopK | None, kl_weight: float
    ) -> torch.Tensor:
        gradient_NV = torch.empty_like(logits_NV)
        total = logits_NV.new_zeros((), dtype=torch.float64)
        for start in range(0, len(labels_N), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = logits_NV[part].to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
            labels = labels_N[part, None]
            logit_of_label = logits.gather(1, labels)
            logit_of_kept = None if teacher is None else logits.gather(1, teacher.ids_NK[part])
            top = logits.amax(1, keepdim=True)
            exp = logits.sub_(top).exp_()  # in place: every pass over [N, V] costs as much as the arithmetic in it
            exp_sum = exp.sum(1, keepdim=True)
            log_sum = exp_sum.log() + top
            if teacher is None or logit_of_kept is None:
                total += (log_sum - logit_of_label).sum()
                gradient = exp.div_(exp_sum)
                gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1.0))
            else:
                kept = TeacherTopK(*(t[part] for t in teacher))
                total += (1 - kl_weight) * (log_sum - logit_of_label).sum()
                kl, at_kept, elsewhere = _kl_and_gradient(logit_of_kept - log_sum, kept, kl_weight)
                total += kl_weight * kl.sum()
                gradient = exp.mul_(elsewhere / exp_sum).scatter_(1, kept.ids_NK, at_kept)
                gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, kl_weight - 1))
            gradient_NV[part] = gradient
        ctx.save_for_backward(gradient_NV)
        return total.to(torch.promote_types(logits_NV.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(outer[0].to(gradient_NV.dtype)), None, None, None


def _kl_and_gradient(
    log_q_NK: torch.Tensor, teacher: TeacherTopK, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL [N], and the gradient of `weight` KL + (1 - weight) log-sum-exp to the logits, from the student's `log_q_NK`.

    The gradient of the KL is q - p': p' is p on the kept tokens and tail * q / q_tail elsewhere. Returned are its
    values on the kept tokens [N, K] and, as a factor of q, elsewhere [N, 1].
    """
    _, log_p, tail = teacher
    p, q, kept = log_p.exp(), log_q_NK.exp(), log_p.isfinite()
    q_tail = (1 - q.where(kept, 0).sum(1)).clamp_min(TINY)
    kl = (p * (log_p - log_q_NK)).where(kept, 0).sum(1) + torch.special.xlogy(tail, tail / q_tail)
    elsewhere = (1 - weight * tail / q_tail)[:, None]
    return kl, torch.where(kept, q - weight * p, q * elsewhere), elsewhere


def answer_loss(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, teacher: TeacherTopK | None = None, kl_weight: float = 0.0
) -> torch.Tensor:
    """Summed over the positions: (1 - kl_weight) cross-entropy on the labels + kl_weight KL(teacher || student), nats.

    The KL runs over the teacher's top-k tokens and one bucket for all others: a lower bound of the full KL, exact
    when the student spreads its tail as the teacher does (log-sum inequality; Cover & Thomas, Elements of
    Information Theory, 2.7.1). The gradient is computed here, in one pass over the logits.
    """
    loss: torch.Tensor = _AnswerLoss.apply(logits_NV, labels_N, teacher, kl_weight)  # type: ignore[no-untyped-call]
    return loss
