"""student: a smaller model cut out of the merged teacher, not yet healed."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import Artifact
from edgeft.errors import ModelError
from edgeft.formats.hf import load_model, save_model, write_json
from edgeft.plan import StudentNode
from edgeft.progress import Reporter
from edgeft.shrink.depth import Cut, remove_least_needed
from edgeft.shrink.goal import goal_of
from edgeft.shrink.shape import SHAPE
from edgeft.shrink.surgery import Surgery
from edgeft.shrink.turning import Turn, least_influence, least_turning_block
from edgeft.shrink.vocabulary import (
    VOCABULARY,
    choose_tokens,
    cut_token_ids,
    cut_tokenizer,
    cut_tokenizer_settings,
)
from edgeft.text.chat import ChatTokenizer, read_json
from edgeft.text.encode import Encoded, load_encoded
from edgeft.tune.batches import Batch, collate
from edgeft.tune.precision import choose_compute, place

CALIBRATION_ROWS = 16  # training rows that say which layers are needed
WIDTH_ROWS = 64  # as many others say which channels are, and what each cut costs

Removed = list[Cut] | list[Turn]


def run(cfg: StudentNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset, and shape if that was timed.

    Writes the cut model and, if it has fewer tokens than the teacher, `vocabulary.json`: the teacher's id of each one.
    The model is the teacher; after the first of several cuts it is the student healed so far, and a third input, `cut`,
    is what that was before healing.
    """
    folder = inputs["model"].path
    chat = ChatTokenizer.from_folder(folder)
    rows = load_encoded(inputs["dataset"].file("train.jsonl"), chat, cfg.max_tokens)
    model = load_model(folder, torch.float32)
    timed = inputs["shape"].read_json(SHAPE) if "shape" in inputs else {}
    goal = goal_of(cfg.student.model_copy(update=timed), model.config, cfg.steps_left)
    before = _parameters(model)
    pick = random.Random(0)
    chosen = _of_middle_length(pick.sample(rows, min(3 * CALIBRATION_ROWS, len(rows))))
    others = sorted(pick.sample(rows, min(WIDTH_ROWS, len(rows))), key=lambda row: len(row.ids))
    parts = [chosen, *(others[i : i + CALIBRATION_ROWS] for i in range(0, len(others), CALIBRATION_ROWS))]
    compute = choose_compute(cfg.precision)
    probed = place(load_model(folder, compute.dtype), compute, max(len(row.ids) for part in parts for row in part))
    first, *batches = [collate(part, chat.pad_id).to(compute.device) for part in parts]
    surgery = Surgery(model, probed, batches)
    layers, removed = _keep_layers(surgery, goal.layers, cfg.student.layer_choice, first, report)
    surgery.keep_kv_heads(goal.kv_heads)
    surgery.keep_ffn(goal.ffn)
    surgery.keep_hidden(goal.hidden)
    for kind, entries in surgery.removed.items():
        report.metric(cut=kind, removed=entries)
    vocabulary = _save(surgery, cfg, inputs, out, rows)
    after = _parameters(surgery.exact)
    report.note(f"kept layers {layers}: {after / 1e6:.1f}M of {before / 1e6:.1f}M parameters")
    losses = [f"{surgery.loss_before:.3f} whole", *(f"{cut.loss:.3f} after {cut.cut}" for cut in surgery.reports)]
    report.note(f"loss on training rows, before healing: {', '.join(losses)}")
    if cfg.steps_left == 1 and surgery.removed and (odd := goal.widths_off_k_quants()):
        report.note(f"{' and '.join(odd)}: no multiple of 256, so GGUF's k-quants will take larger types there")
    return {
        "layers_kept": layers,
        "layers_removed": [asdict(layer) for layer in removed],
        "loss_before": surgery.loss_before,
        "cuts": [asdict(cut) for cut in surgery.reports],
        **vocabulary,
        "parameters": after,
        "parameters_before": before,
    }


def _keep_layers(surgery: Surgery, keep: int, by: str, batch: Batch, report: Reporter) -> tuple[list[int], Removed]:
    """Cut in depth; returns which layers stay, and those that went with the reason."""
    total, removed = surgery.exact.config.num_hidden_layers, list[Any]()
    with report.track("layers removed", total - keep) as bar:
        if by == "loss":
            removed = remove_least_needed(surgery.probed, keep, batch, on_cut=bar.advance)
        else:
            choose = least_influence if by == "influence" else least_turning_block
            removed = choose(surgery.probed, keep, surgery.batches)
            bar.advance(total - keep)
    gone = {layer.layer for layer in removed}
    layers = [layer for layer in range(total) if layer not in gone]
    surgery.keep_layers(layers)
    return layers, removed


def _save(
    surgery: Surgery, cfg: StudentNode, inputs: dict[str, Artifact], out: Path, rows: list[Encoded]
) -> dict[str, Any]:
    """Write the student, with fewer tokens if the settings say so; returns what there is to tell of that."""
    folder, vocab_size = inputs["model"].path, surgery.exact.config.vocab_size
    earlier = inputs["cut"].path / VOCABULARY if "cut" in inputs else None
    known = read_json(earlier) if earlier and earlier.is_file() else None
    if cfg.student.vocabulary is None:
        save_model(surgery.finish(), out, folder)
        facts: dict[str, Any] = {}
    else:
        kept, facts = _save_with_fewer_tokens(surgery, cfg.student.vocabulary, inputs, out, rows, cfg.max_tokens)
        known = known or {"teacher_ids": list(range(vocab_size)), "teacher_vocab_size": vocab_size}
        known = {**known, "teacher_ids": [known["teacher_ids"][i] for i in kept]}
    if known:
        (out / VOCABULARY).write_text(json.dumps(known), "utf-8")
    return facts


def _save_with_fewer_tokens(
    surgery: Surgery, size: int, inputs: dict[str, Artifact], out: Path, rows: list[Encoded], max_tokens: int
) -> tuple[list[int], dict[str, Any]]:
    """Write the student with a vocabulary of `size` tokens; returns which these are.

    Raises ModelError if a training row would be cut into other tokens than before.
    """
    folder, dataset = inputs["model"].path, inputs["dataset"]
    tokenizer = read_json(folder / "tokenizer.json")
    kept = choose_tokens(tokenizer, {i for row in rows for i in row.ids}, size)
    surgery.keep_tokens(kept)
    save_model(surgery.finish(), out, folder)
    write_json(out / "tokenizer.json", cut_tokenizer(tokenizer, kept))
    settings = out / "tokenizer_config.json"
    write_json(settings, cut_tokenizer_settings(read_json(settings), kept))
    for name in ("config.json", "generation_config.json"):
        write_json(out / name, cut_token_ids(read_json(out / name), kept))
    before, after = ChatTokenizer.from_folder(folder), ChatTokenizer.from_folder(out)
    again = load_encoded(dataset.file("train.jsonl"), after, max_tokens)
    if any([kept[i] for i in new.ids] != list(old.ids) for new, old in zip(again, rows, strict=True)):
        raise ModelError("the smaller tokenizer cuts training rows differently", "leave out student.vocabulary")
    unseen = [load_encoded(dataset.file("validation.jsonl"), chat, 2 * max_tokens) for chat in (after, before)]
    longer = [sum(len(row.ids) for row in split) for split in unseen]
    return kept, {
        "vocabulary": len(kept),
        "vocabulary_teacher": before.vocab_size,
        "validation_tokens": longer[0] / longer[1],
    }


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _of_middle_length(rows: list[Encoded]) -> list[Encoded]:
    """At most CALIBRATION_ROWS rows that need little padding beside each other."""
    start = (len(rows) - min(CALIBRATION_ROWS, len(rows))) // 2
    return sorted(rows, key=lambda row: len(row.ids))[start : start + CALIBRATION_ROWS]
