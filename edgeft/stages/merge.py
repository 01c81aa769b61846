"""merge: the adapter folded into the weights it was trained against, scored before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import Artifact
from edgeft.errors import ModelError
from edgeft.formats.hf import load_model, save_model
from edgeft.progress import Reporter
from edgeft.recipe import MergeSettings
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.methods import merge_learned
from edgeft.tune.precision import Compute, choose_compute, place
from edgeft.tune.validation import General, Validation, general_text, validate


def run(cfg: MergeSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the base), adapter, dataset. Writes the merged model."""
    base, adapter = inputs["model"], inputs["adapter"]
    trained_on = adapter.manifest.inputs.get("model")
    if trained_on != base.digest:
        raise ModelError(
            f"the adapter was trained on base {str(trained_on)[:12]}, this base is {base.digest[:12]}",
            "merge it into the base it was trained on",
        )
    model = load_model(base.path, torch.float32)
    folded = merge_learned(model, adapter, cfg.into)
    save_model(model, out, base.path)
    compute, max_tokens = choose_compute(str(adapter.metrics["precision"])), int(adapter.config["max_tokens"])
    after = _look(out, inputs["dataset"], compute, max_tokens)
    untrained = _general(base.path, compute)
    general = _general(out, compute)
    before = Validation(*(adapter.metrics["validation"][name] for name in Validation._fields))
    report.note(
        f"{folded['tensors_folded']} tensors folded; validation loss {before.loss:.4f} as trained, {after.loss:.4f} "
        f"merged; right first lines {before.exact_match:.1%} and {after.exact_match:.1%}"
    )
    report.note(f"general text: {untrained.bits_per_byte:.3f} bits per byte before, {general.bits_per_byte:.3f} now")
    return {
        **folded,
        "into": cfg.into,
        "validation_as_trained": before._asdict(),
        "validation": after._asdict(),
        "general_base": untrained._asdict(),
        "general": general._asdict(),
    }


def _look(folder: Path, dataset: Artifact, compute: Compute, max_tokens: int) -> Validation:
    """Loss and exact match of the model as saved, in the arithmetic that it was trained in."""
    chat = ChatTokenizer.from_folder(folder)
    rows = load_encoded(dataset.file("validation.jsonl"), chat, max_tokens)
    model = place(load_model(folder, compute.dtype), compute, max(len(row.ids) for row in rows))
    return validate(model, rows, chat, compute.device)


def _general(folder: Path, compute: Compute) -> General:
    model = load_model(folder, compute.dtype).to(compute.device)
    return general_text(model, ChatTokenizer.from_folder(folder), compute.device)
