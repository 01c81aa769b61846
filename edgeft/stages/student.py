"""student: a smaller model cut out of the merged teacher, not yet healed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import Artifact
from edgeft.formats.hf import load_model, save_model
from edgeft.progress import Reporter
from edgeft.recipe import StudentSettings
from edgeft.shrink.depth import keep_layers, spaced_layers


def run(cfg: StudentSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Input: model (the teacher). Writes the cut model."""
    teacher = load_model(inputs["model"].path, torch.float32)
    layers = spaced_layers(teacher.config.num_hidden_layers, cfg.layers)
    student = keep_layers(teacher, layers)
    save_model(student, out, inputs["model"].path)
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (("teacher", teacher), ("student", student))}
    report.note(f"kept layers {layers}: {sizes['student'] / 1e6:.1f}M of {sizes['teacher'] / 1e6:.1f}M parameters")
    return {"layers_kept": layers, "parameters": sizes["student"], "parameters_teacher": sizes["teacher"]}
