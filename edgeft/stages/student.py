"""student: a smaller model cut out of the merged teacher, not yet healed."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import Artifact
from edgeft.formats.hf import load_model, save_model
from edgeft.plan import StudentNode
from edgeft.progress import Reporter
from edgeft.shrink.depth import keep_layers, remove_least_needed
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, load_encoded
from edgeft.tune.batches import collate
from edgeft.tune.precision import choose_compute, place

CALIBRATION_ROWS = 16  # training rows that say which layers are needed


def run(cfg: StudentNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the teacher), dataset. Writes the cut model."""
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    rows = load_encoded(inputs["dataset"].file("train.jsonl"), chat, cfg.max_tokens)
    chosen = _of_middle_length(random.Random(0).sample(rows, min(3 * CALIBRATION_ROWS, len(rows))))
    teacher = load_model(inputs["model"].path, torch.float32)
    total = teacher.config.num_hidden_layers
    compute = choose_compute(cfg.precision)
    probed = place(load_model(inputs["model"].path, compute.dtype), compute, max(len(row.ids) for row in chosen))
    with report.track("layers removed", max(0, total - cfg.student.layers)) as bar:
        batch = collate(chosen, chat.pad_id).to(compute.device)
        cuts = remove_least_needed(probed, cfg.student.layers, batch, on_cut=bar.advance)
    removed = {cut.layer for cut in cuts}
    layers = [layer for layer in range(total) if layer not in removed]
    student = keep_layers(teacher, layers)
    save_model(student, out, inputs["model"].path)
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (("teacher", teacher), ("student", student))}
    report.note(f"kept layers {layers}: {sizes['student'] / 1e6:.1f}M of {sizes['teacher'] / 1e6:.1f}M parameters")
    return {
        "layers_kept": layers,
        "layers_removed": [asdict(cut) for cut in cuts],
        "parameters": sizes["student"],
        "parameters_teacher": sizes["teacher"],
    }


def _of_middle_length(rows: list[Encoded]) -> list[Encoded]:
    """At most CALIBRATION_ROWS rows that need little padding beside each other."""
    start = (len(rows) - min(CALIBRATION_ROWS, len(rows))) // 2
    return sorted(rows, key=lambda row: len(row.ids))[start : start + CALIBRATION_ROWS]
