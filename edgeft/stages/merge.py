"""merge: what was learned is put into the weights it was trained against, at the strength that validates best."""

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
from edgeft.text.encode import Encoded, load_encoded
from edgeft.tune.fit import rank
from edgeft.tune.fold_check import check_fold
from edgeft.tune.methods import merge_learned
from edgeft.tune.precision import Compute, choose_compute, place
from edgeft.tune.validation import General, Validation, general_text, validate

STRENGTHS = (1.0, 0.9, 0.8, 0.7)  # tried by "auto" (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903)


def run(cfg: MergeSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the base), adapter (what was learned), dataset. Writes the merged model."""
    base, learned = inputs["model"], inputs["adapter"]
    trained_on = learned.manifest.inputs.get("model")
    if trained_on != base.digest:
        raise ModelError(
            f"the adapter was trained on base {str(trained_on)[:12]}, this base is {base.digest[:12]}",
            "merge it into the base it was trained on",
        )
    compute = choose_compute(str(learned.metrics["precision"]))  # the arithmetic that it was trained in
    rows = load_encoded(
        inputs["dataset"].file("validation.jsonl"), ChatTokenizer.from_folder(base.path), learned.config["max_tokens"]
    )
    looks: dict[float, Validation] = {}
    for strength in STRENGTHS if cfg.strength == "auto" else (cfg.strength,):
        folded = _merge(cfg, base, learned, strength, out)
        looks[strength] = _look(out, rows, compute)
    best = min(looks, key=lambda strength: rank(looks[strength]._asdict(), str(learned.config["choose_by"])))
    if best != strength:
        folded = _merge(cfg, base, learned, best, out)
    rung = check_fold(base.path, learned, cfg.into, out, rows)
    trained, merged = learned.metrics["validation"], looks[best]
    before, after = _general(base.path, compute), _general(out, compute)
    report.note(
        f"{folded['tensors_folded']} tensors folded at strength {best:g}; validation loss {trained['loss']:.4f} as "
        f"trained, {merged.loss:.4f} merged; right first lines {trained['exact_match']:.1%}, {merged.exact_match:.1%}"
    )
    report.note(
        f"merged beside trained: mean KL {rung['validation']['kl_mean']:.2g} on validation rows, "
        f"{rung['general']['kl_mean']:.2g} on general text"
    )
    report.note(f"general text: {before.bits_per_byte:.3f} bits per byte before, {after.bits_per_byte:.3f} now")
    return {
        **folded,
        "into": cfg.into,
        "strength": best,
        "validation_as_trained": {name: trained[name] for name in Validation._fields},
        "validation": merged._asdict(),
        "validation_by_strength": {f"{strength:g}": look._asdict() for strength, look in looks.items()},
        "from_trained": rung,
        "general_base": before._asdict(),
        "general": after._asdict(),
    }


def _merge(cfg: MergeSettings, base: Artifact, learned: Artifact, strength: float, out: Path) -> dict[str, float | int]:
    model = load_model(base.path, torch.float32)
    folded = merge_learned(model, learned, cfg.into, strength)
    save_model(model, out, base.path)
    return folded


def _look(folder: Path, rows: list[Encoded], compute: Compute) -> Validation:
    """Loss and exact match of the model as saved."""
    model = place(load_model(folder, compute.dtype), compute, max(len(row.ids) for row in rows))
    return validate(model, rows, ChatTokenizer.from_folder(folder), compute.device)


def _general(folder: Path, compute: Compute) -> General:
    model: Any = load_model(folder, compute.dtype)
    model.to(compute.device)
    return general_text(model, ChatTokenizer.from_folder(folder), compute.device)
