"""What train and distill have in common: look, say what the run needs, train, look again, write down what happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import CHECKPOINT_DIR
from edgeft.learning_settings import LoopSettings
from edgeft.progress import Reporter
from edgeft.tune.arithmetic import Arithmetic
from edgeft.tune.fit import LossFunction, fit
from edgeft.tune.memory import fit_into_memory
from edgeft.tune.precision import Compute
from edgeft.tune.validation import Validation


@dataclass(frozen=True)
class Lesson:
    """A model made ready to learn, and what it learns from."""

    model: Any  # computes
    trained: torch.nn.Module  # holds the weights that change
    lengths: list[int]  # of the training rows, in tokens
    loss_of: LossFunction
    validate: Callable[[], Validation]
    compute: Compute


def learn(
    lesson: Lesson, cfg: LoopSettings, out: Path, report: Reporter
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train and write `history.json`; returns the best weights by name, float32, and what the manifest tells."""
    compute, checkpoints, before = lesson.compute, out / CHECKPOINT_DIR, lesson.validate()
    rows = (lesson.trained, lesson.lengths, lesson.loss_of)
    settings, expected = fit_into_memory(lesson.model, *rows, cfg, checkpoints, report)
    arithmetic = Arithmetic.of(lesson.model, compute.rate)
    weights, history = fit(*rows, lesson.validate, settings, checkpoints, report, arithmetic)
    (out / "history.json").write_text(json.dumps(asdict(history)), "utf-8")
    return weights, {
        "rows": len(lesson.lengths),
        "tokens_per_epoch": sum(lesson.lengths),
        "steps": int(history.steps[-1]["step"]),
        "validation_before": before._asdict(),
        "validation": history.best,
        "best_step": history.best_step,
        "stopped_early": history.stopped_early,
        "precision": compute.name,
        "int8_products": compute.int8,
        "device": compute.device.type,
        "gemm_gflops": compute.gflops,
        "memory_expected_bytes": expected,
    }
