"""probe: real validation rows and the torch model's logits on their answers, frozen for every parity check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeft.artifact import Artifact
from edgeft.formats.hf import load_model
from edgeft.formats.probe import Probe
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.batches import collate, trained_positions
from edgeft.tune.losses import answer_logits

if TYPE_CHECKING:
    from edgeft.plan import ProbeNode

BATCH_ROWS = 8


def run(cfg: ProbeNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset. Writes `probe.safetensors`: float32 reference logits on the CPU."""
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    rows = load_encoded(inputs["dataset"].file("validation.jsonl"), chat, cfg.max_tokens)
    chosen = rows[:: max(1, len(rows) // cfg.rows)][: cfg.rows]
    model = load_model(inputs["model"].path, torch.float32).eval()
    parts = []
    with report.track("reference logits", len(chosen)) as bar, torch.no_grad():
        for start in range(0, len(chosen), BATCH_ROWS):
            batch = collate(chosen[start : start + BATCH_ROWS], chat.pad_id)
            parts.append(answer_logits(model, batch).float())
            bar.advance(len(batch.ids_BT))
    positions = [trained_positions(row) for row in chosen]
    Probe([list(row.ids) for row in chosen], positions, torch.cat(parts).numpy()).save(out)
    return {"rows": len(chosen), "positions": sum(map(len, positions))}
