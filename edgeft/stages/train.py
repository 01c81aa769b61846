"""train: a QLoRA adapter over the 4-bit base, from the dataset's rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgeft.artifact import CHECKPOINT_DIR, Artifact
from edgeft.formats.hf import load_model
from edgeft.progress import Reporter
from edgeft.recipe import TrainSettings
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.fit import fit
from edgeft.tune.losses import answer_logits, answer_loss, validation_loss
from edgeft.tune.precision import choose_compute, place
from edgeft.tune.qlora import adapter_config, adapter_tensors, add_adapter, load_4bit


def run(cfg: TrainSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset. Writes the adapter in PEFT's layout and `history.json`."""
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
    base = load_4bit(load_model(inputs["model"].path, torch.float32), cfg.double_quant, compute)
    base = place(base, compute, max(len(row.ids) for row in rows))
    model = add_adapter(base, cfg.rank, cfg.alpha, cfg.dropout, cfg.target_modules, cfg.seed).to(compute.dtype)

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix).to(compute.device)
        loss = answer_loss(answer_logits(model.get_base_model(), batch), batch.labels_N)
        return loss, len(batch.labels_N), batch.num_tokens

    def validate() -> float:
        return validation_loss(model.get_base_model(), validation, chat.pad_id, compute.device)

    before = validate()
    weights, history = fit(model, [len(r.ids) for r in rows], loss_of, validate, cfg, out / CHECKPOINT_DIR, report)
    save_file(adapter_tensors(model, weights), out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = adapter_config(model, base_name=f"sha256:{inputs['model'].digest}")
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), "utf-8")
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
