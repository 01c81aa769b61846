"""merge: what was learned is put into the weights and at the strength that are best on validation rows, as measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import Artifact
from edgeft.errors import ModelError
from edgeft.formats.hf import load_model, save_model
from edgeft.plan import MergeNode
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, load_encoded
from edgeft.tune.combine import combine_adapters
from edgeft.tune.fit import rank
from edgeft.tune.fold_check import check_fold
from edgeft.tune.landing import PER_LAYER, choose_into
from edgeft.tune.methods import DEQUANTIZED, Into, attach_learned, merge_learned
from edgeft.tune.precision import Compute, choose_compute, place
from edgeft.tune.validation import General, Validation, general_text, validate

STRENGTHS = (1.0, 0.9, 0.8, 0.7)  # tried by "auto" (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903)


def run(cfg: MergeNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the base), adapter (what was learned), dataset. Writes the merged model."""
    base, learned = inputs["model"], inputs["adapter"]
    trained_on = learned.manifest.inputs.get("model")
    if trained_on != base.digest:
        raise ModelError(
            f"the adapter was trained on base {str(trained_on)[:12]}, this base is {base.digest[:12]}",
            "merge it into the base it was trained on",
        )
    rows = load_encoded(
        inputs["dataset"].file("validation.jsonl"), ChatTokenizer.from_folder(base.path), learned.config["max_tokens"]
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        combined: dict[str, Any] = {}
        if cfg.merge.adapters:
            learned, combined = combine_adapters(base, learned, cfg.merge, Path(folder), report)
        return _merge(cfg, base, learned, rows, out, report) | combined


def _merge(
    cfg: MergeNode, base: Artifact, learned: Artifact, rows: list[Encoded], out: Path, report: Reporter
) -> dict[str, Any]:
    compute = choose_compute(str(learned.metrics["precision"]))  # the arithmetic that it was trained in
    name, into, ways = _choose_into(cfg, base, learned, rows, compute, report)
    strength, looks = _choose_strength(cfg, base, learned, into, rows, compute)
    model = load_model(base.path, torch.float32)
    folded = merge_learned(model, learned, into, strength)
    save_model(model, out, base.path)
    del model
    rung = check_fold(base.path, learned, into, out, rows, cfg.max_kl)
    trained, merged = _as_trained(cfg, base, learned, rows, compute), looks[strength]
    before, after = _general(base.path, compute), _general(out, compute)
    report.note(
        f"{folded['tensors_folded']} tensors folded at strength {strength:g}; validation loss {trained.loss:.4f} as "
        f"trained, {merged.loss:.4f} merged; right first lines {trained.exact_match:.1%}, {merged.exact_match:.1%}"
    )
    report.note(
        f"merged beside trained: mean KL {rung['validation']['kl_mean']:.2g} on validation rows, "
        f"{rung['general']['kl_mean']:.2g} on general text"
    )
    report.note(f"general text: {before.bits_per_byte:.3f} bits per byte before, {after.bits_per_byte:.3f} now")
    return {
        **folded,
        "into": name,
        "into_measured": ways,
        "strength": strength,
        "validation_as_trained": trained._asdict(),
        "validation": merged._asdict(),
        "validation_by_strength": {f"{strength:g}": look._asdict() for strength, look in looks.items()},
        "from_trained": rung,
        "general_base": before._asdict(),
        "general": after._asdict(),
    }


def _as_trained(cfg: MergeNode, base: Artifact, learned: Artifact, rows: list[Encoded], compute: Compute) -> Validation:
    """What training left, or, as nobody trained several adapters together, all of them beside the weights it had."""
    if not cfg.merge.adapters:
        found = learned.metrics["validation"]
        return Validation(**{name: found[name] for name in Validation._fields})
    model = attach_learned(load_model(base.path, torch.float32), learned, DEQUANTIZED)
    longest = max(len(row.ids) for row in rows)
    return validate(place(model, compute, longest), rows, ChatTokenizer.from_folder(base.path), compute.device)


def _choose_into(
    cfg: MergeNode, base: Artifact, learned: Artifact, rows: list[Encoded], compute: Compute, report: Reporter
) -> tuple[str, Into, dict[str, Any] | None]:
    """What is folded into, by name and by layer, and what was measured if there was a choice."""
    wish = cfg.merge.into
    if learned.config["method"] != "qlora":
        return "original", DEQUANTIZED, None  # there is but one base
    if wish not in ("auto", PER_LAYER):
        return wish, wish, None
    name, into, found = choose_into(wish, base.path, learned, rows, cfg.bits, compute)
    form = "cut" if cfg.bits else "as_is"
    said = ", ".join(f"{way} {looks[form]['loss']:.4f}" for way, looks in found["ways"].items())
    bits = f" in {cfg.bits} bits" if cfg.bits else ""
    report.note(f"folded into: {name}; validation loss{bits} by what the adapter is folded into: {said}")
    return name, into, found


def _choose_strength(
    cfg: MergeNode, base: Artifact, learned: Artifact, into: Into, rows: list[Encoded], compute: Compute
) -> tuple[float, dict[float, Validation]]:
    """The best strength, and what was tried: less and less, until it gets worse."""
    chat, longest = ChatTokenizer.from_folder(base.path), max(len(row.ids) for row in rows)
    looks: dict[float, Validation] = {}

    def badness(strength: float) -> tuple[float, float]:
        return rank(looks[strength]._asdict(), str(learned.config["choose_by"]))

    for strength in STRENGTHS if cfg.merge.strength == "auto" else (cfg.merge.strength,):
        model = load_model(base.path, torch.float32)
        merge_learned(model, learned, into, strength)
        looks[strength] = validate(place(model, compute, longest), rows, chat, compute.device)
        if badness(strength) > min(map(badness, looks)):
            break
    return min(looks, key=badness), looks


def _general(folder: Path, compute: Compute) -> General:
    model: Any = load_model(folder, compute.dtype)
    model.to(compute.device)
    return general_text(model, ChatTokenizer.from_folder(folder), compute.device)
