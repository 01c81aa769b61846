"""train: the teacher learns the dataset's rows, by default as a QLoRA adapter over the 4-bit base."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import CHECKPOINT_DIR, Artifact
from edgeft.formats.hf import load_model
from edgeft.progress import Reporter
from edgeft.recipe import TrainSettings
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.fit import LossFunction, fit
from edgeft.tune.losses import answer_logits, answer_loss
from edgeft.tune.methods import Learner, make_learner, save_learned
from edgeft.tune.precision import Compute, choose_compute
from edgeft.tune.validation import Validation, validate


@dataclass(frozen=True)
class Training:
    """A model made ready to learn and the rows it learns from."""

    compute: Compute
    learner: Learner
    lengths: list[int]  # of the training rows, in tokens
    loss_of: LossFunction
    validate: Callable[[], Validation]


def prepare(cfg: TrainSettings, model: Path, dataset: Artifact, report: Reporter) -> Training:
    """Load model and rows as a run of this stage does."""
    chat = ChatTokenizer.from_folder(model)
    rows, validation = (
        load_encoded(dataset.file(f"{split}.jsonl"), chat, cfg.max_tokens) for split in ("train", "validation")
    )
    prefix, lengths = shared_tokens(rows), [len(row.ids) for row in rows]
    compute = choose_compute(cfg.precision)
    report.note(
        f"{compute.name} on {compute.device.type}; measured GEMM rates in GFLOP/s: {compute.gflops or 'not asked'}"
    )
    learner = make_learner(load_model(model, torch.float32), cfg, compute, max(lengths))

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix).to(compute.device)
        loss = answer_loss(answer_logits(learner.model, batch), batch.labels_N)
        return loss, len(batch.labels_N), batch.num_tokens

    return Training(
        compute, learner, lengths, loss_of, lambda: validate(learner.model, validation, chat, compute.device)
    )


def run(cfg: TrainSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset. Writes what was learned (`save_learned`) and `history.json`."""
    training = prepare(cfg, inputs["model"].path, inputs["dataset"], report)
    before = training.validate()
    weights, history = fit(
        training.learner.trained,
        training.lengths,
        training.loss_of,
        training.validate,
        cfg,
        out / CHECKPOINT_DIR,
        report,
    )
    save_learned(training.learner, cfg, weights, f"sha256:{inputs['model'].digest}", out)
    (out / "history.json").write_text(json.dumps(asdict(history)), "utf-8")
    return {
        "trainable_parameters": sum(w.numel() for w in weights.values()),
        "rows": len(training.lengths),
        "tokens_per_epoch": sum(training.lengths),
        "steps": int(history.steps[-1]["step"]),
        "validation_before": before._asdict(),
        "validation": history.best,
        "best_step": history.best_step,
        "stopped_early": history.stopped_early,
        "precision": training.compute.name,
        "device": training.compute.device.type,
        "gemm_gflops": training.compute.gflops,
    }
