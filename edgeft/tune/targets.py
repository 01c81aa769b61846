"""The teacher's cached answers: top-k log-probabilities and the exact tail mass, in shards of rows.

N trained positions, K kept tokens, V vocabulary. A shard holds `ids` [N, K] int32, `logp` [N, K] float16,
`tail` [N] float32 and `count` [rows] int32 (positions per row): 6 K + 4 bytes per trained token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate, ordered_batches, shared_tokens, trained_positions
from edgeft.tune.losses import CHUNK_ROWS, TeacherTopK, answer_logits
from edgeft.tune.validation import EVAL_TOKENS

LEAST_LEFT = 1e-3  # smallest share of the teacher's probability that is scaled up to one when a vocabulary is cut
BLOCK = 64  # vocabulary entries whose maximum is looked at first


@dataclass(frozen=True)
class RowTargets:
    """One row's teacher probabilities at its trained positions, as in the module's text."""

    ids_NK: torch.Tensor
    logp_NK: torch.Tensor
    tail_N: torch.Tensor


def top_k(logits_NV: torch.Tensor, k: int) -> RowTargets:
    """Keep the k most probable tokens of each position and the probability of all others together."""
    logp, ids = zip(*(_top_k_logp(part, k) for part in logits_NV.split(CHUNK_ROWS)), strict=True)
    logp_NK, ids_NK = torch.cat(logp), torch.cat(ids)
    tail_N = (1 - logp_NK.double().exp().sum(1)).clamp(0, 1).float()
    return RowTargets(ids_NK.int(), logp_NK.half(), tail_N)


def _top_k_logp(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N, k] and ids of the k most probable tokens, most probable first.

    They stand in the k blocks with the largest maxima, so that only these are sorted.
    """
    logits = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if logits.shape[1] <= k * BLOCK:
        top, ids = logits.topk(k)
    else:
        blocks = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))
        candidates = blocks.amax(2).topk(k).indices.sort(1).values
        near = blocks.gather(1, candidates[:, :, None].expand(-1, -1, BLOCK))
        top, at = near.flatten(1).topk(k)
        ids = candidates.gather(1, at // BLOCK) * BLOCK + at % BLOCK
    return top - logits.logsumexp(1, keepdim=True), ids


@torch.no_grad()
def teacher_targets(
    model: Any, rows: Sequence[Encoded], k: int, temperature: float, pad_id: int, device: torch.device,
    end_id: int | None = None,
) -> list[RowTargets]:  # fmt: skip
    """Targets of each row, in the order of the rows; `end_id` ends the vocabulary where the model's output is wider."""
    found: dict[int, RowTargets] = {}
    prefix = shared_tokens(rows)
    for numbers in ordered_batches([len(row.ids) for row in rows], EVAL_TOKENS):
        batch = collate([rows[i] for i in numbers], pad_id, prefix).to(device)
        kept = top_k(answer_logits(model, batch)[:, :end_id].div_(temperature), k)
        counts = [len(trained_positions(rows[i])) for i in numbers]
        parts = zip(*(t.cpu().split(counts) for t in (kept.ids_NK, kept.logp_NK, kept.tail_N)), strict=True)
        found |= {row: RowTargets(*part) for row, part in zip(numbers, parts, strict=True)}
    return [found[i] for i in range(len(rows))]


def save_shard(path: Path, rows: Sequence[RowTargets]) -> None:
    """Write beside, then rename, so that a shard is whole or absent."""
    beside = path.with_suffix(".writing")
    save_file(
        {
            "ids": torch.cat([row.ids_NK for row in rows]),
            "logp": torch.cat([row.logp_NK for row in rows]),
            "tail": torch.cat([row.tail_N for row in rows]),
            "count": torch.tensor([len(row.tail_N) for row in rows], dtype=torch.int32),
        },
        beside,
    )
    beside.replace(path)


def load_shard(path: Path) -> list[RowTargets]:
    """The rows of one shard."""
    raw = load_file(path)
    counts = raw["count"].tolist()
    parts = zip(*(raw[name].split(counts) for name in ("ids", "logp", "tail")), strict=True)
    return [RowTargets(*part) for part in parts]


def student_ids(teacher_ids: Sequence[int], teacher_vocab_size: int) -> torch.Tensor:
    """For each of the teacher's V tokens the student's id, or -1; `teacher_ids[i]` is the teacher's id of token i."""
    ids_V = torch.full((teacher_vocab_size,), -1)
    ids_V[list(teacher_ids)] = torch.arange(len(teacher_ids))
    return ids_V


def translate(row: RowTargets, student_ids_V: torch.Tensor) -> RowTargets:
    """The row for a student with fewer tokens: `student_ids_V` as from `student_ids`.

    What the teacher gave to those of its K tokens that the student lacks is shared out over all others in proportion.
    The tail stays whole: how much of it went to other such tokens was not kept. The places that get free say -inf.
    """
    ids_NK = student_ids_V[row.ids_NK.long()]
    known_NK = ids_NK >= 0
    lost_N = row.logp_NK.float().exp().where(~known_NK, 0).sum(1)
    left_N = (1 - lost_N).clamp_min(LEAST_LEFT)
    logp_NK = (row.logp_NK.float() - left_N.log()[:, None]).where(known_NK, -torch.inf)
    candidates = torch.arange(ids_NK.shape[1] + 1)  # one of K + 1 ids is not among the K
    free_N = (ids_NK[:, :, None] == candidates).any(1).int().argmin(1)
    return RowTargets(ids_NK.where(known_NK, free_N[:, None]).int(), logp_NK, row.tail_N / left_N)


def gather(rows: Sequence[RowTargets]) -> TeacherTopK:
    """The targets of several rows, one after the other, as the loss takes them."""
    return TeacherTopK(
        torch.cat([row.ids_NK for row in rows]).long(),
        torch.cat([row.logp_NK for row in rows]).float(),
        torch.cat([row.tail_N for row in rows]),
    )
