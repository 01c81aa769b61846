"""The first rung: a merged model beside the one that was trained, whose adapter still stands beside its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.errors import ParityError
from edgeft.formats.diff import where_they_part
from edgeft.formats.hf import load_model, save_model
from edgeft.formats.parity import by_row, compare, summarize, worst_row
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded
from edgeft.text.general import general_ids
from edgeft.tune.batches import collate, in_parts, trained_positions
from edgeft.tune.losses import answer_logits
from edgeft.tune.methods import DEQUANTIZED, Into, attach_learned, merge_learned

ROWS, GENERAL_TOKENS = 16, 512
BATCH_ROWS = 8
FOLD_KL = 1e-5  # nats; in float32 folding only rounds, which is a thousandth of this


def check_fold(
    base: Path, learned: Artifact, into: Into, merged: Path, rows: Sequence[Encoded], max_kl: float
) -> dict[str, Any]:
    """Compare the merged model with the trained one, on validation rows and general text, in float32.

    Returns the agreement of the model in folder `merged`, by text: by design not whole where less than all of what
    was learned was put in, or other weights than those it was trained against. Raises ParityError if folding all of
    it is more than rounding away from the adapter beside the same weights, or if the merged model is more than
    `max_kl` nats away from the trained one.
    """
    chat = ChatTokenizer.from_folder(base)
    numbers = range(1, len(rows) + 1)[:: max(1, len(rows) // ROWS)][:ROWS]
    chosen = [rows[number - 1] for number in numbers]
    limit = load_model(base).config.max_position_embeddings
    general = [_plain(ids) for ids in general_ids(chat, GENERAL_TOKENS, min(GENERAL_TOKENS, limit))]
    beside = _logits(attach_learned(load_model(base, torch.float32), learned, into), chosen, chat.pad_id)
    folded: Any = load_model(base, torch.float32)
    merge_learned(folded, learned, into)
    fold = compare(beside, _logits(folded, chosen, chat.pad_id), _next_ids(chosen))
    if not fold.kl_mean <= FOLD_KL:
        raise ParityError(
            f"the adapter folded into the weights is not the adapter beside them: mean KL {fold.kl_mean:.4g} nats over "
            f"{fold.n_positions} positions, at most {FOLD_KL:g} expected; top-1 agreement {fold.top1:.1%}",
            "its scale, its orientation or the weights under it were mistaken: this is a bug, report it",
        )
    del folded, beside
    trained: Any = attach_learned(load_model(base, torch.float32), learned, DEQUANTIZED)
    result: Any = load_model(merged, torch.float32)
    found: dict[str, Any] = {"fold_kl_mean": fold.kl_mean}
    for text, some, named in (("validation", chosen, numbers), ("general", general, range(1, len(general) + 1))):
        before, after = (_logits(model, some, chat.pad_id) for model in (trained, result))
        parts = by_row(before, after, _next_ids(some), [len(trained_positions(row)) for row in some])
        parity, worst = summarize(parts), worst_row(parts)
        if not parity.kl_mean <= max_kl:
            raise ParityError(
                f"the merged model is not the one that was trained: mean KL {parity.kl_mean:.4g} nats over "
                f"{parity.n_positions} positions, at most {max_kl:g} expected; top-1 agreement {parity.top1:.1%}; "
                f"worst row {text}:{named[worst]}\n  {_where_they_part(base, learned, merged)}",
                "set merge.into: auto and merge.strength: 1.0, or raise export.max_kl.merged if its accuracy is good",
            )
        found[text] = asdict(parity)
    return found


def _where_they_part(base: Path, learned: Artifact, merged: Path) -> str:
    """The first tensor and layer in which the merged model is not the base with all of what was learned."""
    with tempfile.TemporaryDirectory(dir=merged.parent) as folder:
        model = load_model(base, torch.float32)
        merge_learned(model, learned, DEQUANTIZED)
        save_model(model, Path(folder), base)
        return where_they_part(Path(folder), merged)


@torch.no_grad()
def _logits(model: Any, rows: Sequence[Encoded], pad_id: int) -> NDArray[np.float32]:
    """At the trained positions of all rows [P, V]."""
    parts = [
        answer_logits(model.eval(), collate([rows[i] for i in some], pad_id))
        for some in in_parts(range(len(rows)), BATCH_ROWS)
    ]
    logits_PV: NDArray[np.float32] = torch.cat(parts).numpy()
    return logits_PV


def _next_ids(rows: Sequence[Encoded]) -> NDArray[np.int64]:
    return np.array([row.ids[at + 1] for row in rows for at in trained_positions(row)])


def _plain(ids: list[int]) -> Encoded:
    return Encoded(tuple(ids), (False, *[True] * (len(ids) - 1)))
