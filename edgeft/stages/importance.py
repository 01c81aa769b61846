"""importance: which input channels of a model's matrices your training rows use, for quantisers to keep exact."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeft.artifact import Artifact
from edgeft.formats.hf import load_model
from edgeft.formats.importance import save_importance
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import encode_row, read_rows
from edgeft.tune.importance import mean_input_squares

if TYPE_CHECKING:
    from edgeft.plan import ImportanceNode


def run(cfg: ImportanceNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset. Writes `importance.safetensors`, from a seeded sample of the training rows."""
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    path = inputs["dataset"].file("train.jsonl")
    rows = list(enumerate(read_rows(path), 1))
    chosen = random.Random(cfg.seed).sample(rows, min(cfg.rows, len(rows)))
    encoded = [encode_row(chat, row["messages"], cfg.max_tokens, f"{path.name}:{n}") for n, row in chosen]
    model = load_model(inputs["model"].path, torch.float32).eval()
    with report.track("importance", len(encoded)) as bar:
        importance = mean_input_squares(model, encoded, bar.advance)
    tokens = sum(len(row.ids) for row in encoded)
    save_importance(out, importance, len(encoded), tokens)
    return {"rows": len(encoded), "tokens": tokens, "matrices": len(importance)}
