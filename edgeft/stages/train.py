"""train: the teacher learns the dataset's rows, by default as a QLoRA adapter over the 4-bit base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
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
from edgeft.tune.fit import fit
from edgeft.tune.losses import answer_logits, answer_loss, validation_loss
from edgeft.tune.methods import make_learner, save_learned
from edgeft.tune.precision import choose_compute


def run(cfg: TrainSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset. Writes what was learned (`save_learned`) and `history.json`."""
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    rows, validation = (
        load_encoded(inputs["dataset"].file(f"{split}.jsonl"), chat, cfg.max_tokens)
        for split in ("train", "validation")
    )
    prefix = shared_tokens(rows)
    compute = choose_compute(cfg.precision)
    report.note(
        f"{compute.name} on {compute.device.type}; measured GEMM rates in GFLOP/s: {compute.gflops or 'not asked'}"
    )
    base = load_model(inputs["model"].path, torch.float32)
    learner = make_learner(base, cfg, compute, max(len(row.ids) for row in rows))

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix).to(compute.device)
        loss = answer_loss(answer_logits(learner.model, batch), batch.labels_N)
        return loss, len(batch.labels_N), batch.num_tokens

    def validate() -> float:
        return validation_loss(learner.model, validation, chat.pad_id, compute.device)

    before = validate()
    lengths = [len(row.ids) for row in rows]
    weights, history = fit(learner.trained, lengths, loss_of, validate, cfg, out / CHECKPOINT_DIR, report)
    save_learned(learner, cfg, weights, f"sha256:{inputs['model'].digest}", out)
    (out / "history.json").write_text(json.dumps(asdict(history)), "utf-8")
    best = min(e["loss"] for e in history.evals)
    return {
        "trainable_parameters": sum(w.numel() for w in weights.values()),
        "rows": len(rows),
        "tokens_per_epoch": sum(len(r.ids) for r in rows),
        "steps": int(history.steps[-1]["step"]),
        "validation_loss_before": before,
        "validation_loss": best,
        "best_step": history.best_step,
        "stopped_early": history.stopped_early,
        "precision": compute.name,
        "device": compute.device.type,
        "gemm_gflops": compute.gflops,
    }
