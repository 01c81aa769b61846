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
from edgeft.formats.hf import load_model, read_config, save_model, write_json
from edgeft.plan import StudentNode
from edgeft.progress import Reporter
from edgeft.shrink.depth import keep_layers, remove_least_needed
from edgeft.shrink.vocabulary import VOCABULARY, choose_tokens, cut_embeddings, cut_token_ids, cut_tokenizer
from edgeft.text.chat import ChatTokenizer, read_json
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
    if cfg.student.vocabulary is None:
        save_model(student, out, inputs["model"].path)
        vocabulary = {}
    else:
        vocabulary = _save_with_fewer_tokens(student, cfg.student.vocabulary, inputs, out, rows, cfg.max_tokens)
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (("teacher", teacher), ("student", student))}
    report.note(f"kept layers {layers}: {sizes['student'] / 1e6:.1f}M of {sizes['teacher'] / 1e6:.1f}M parameters")
    return {
        "layers_kept": layers,
        "layers_removed": [asdict(cut) for cut in cuts],
        **vocabulary,
        "parameters": sizes["student"],
        "parameters_teacher": sizes["teacher"],
    }


def _save_with_fewer_tokens(
    student: Any, size: int, inputs: dict[str, Artifact], out: Path, rows: list[Encoded], max_tokens: int
) -> dict[str, Any]:
    """Write the student with a vocabulary of `size` tokens, and `vocabulary.json`: the teacher's id of each of them.

    Raises ModelError if a training row would be cut into other tokens than before.
    """
    teacher, dataset = inputs["model"].path, inputs["dataset"]
    tokenizer = read_json(teacher / "tokenizer.json")
    kept = choose_tokens(tokenizer, {i for row in rows for i in row.ids}, size)
    cut_embeddings(student, kept)
    save_model(student, out, teacher)
    write_json(out / "tokenizer.json", cut_tokenizer(tokenizer, kept))
    for name in ("config.json", "generation_config.json"):
        write_json(out / name, cut_token_ids(read_json(out / name), kept))
    mapping = {"teacher_ids": kept, "teacher_vocab_size": read_config(teacher)["vocab_size"]}
    (out / VOCABULARY).write_text(json.dumps(mapping), "utf-8")
    before, after = ChatTokenizer.from_folder(teacher), ChatTokenizer.from_folder(out)
    again = load_encoded(dataset.file("train.jsonl"), after, max_tokens)
    if any([kept[i] for i in new.ids] != list(old.ids) for new, old in zip(again, rows, strict=True)):
        raise ModelError("the smaller tokenizer cuts training rows differently", "leave out student.vocabulary")
    unseen = [load_encoded(dataset.file("validation.jsonl"), chat, 2 * max_tokens) for chat in (after, before)]
    longer = [sum(len(row.ids) for row in split) for split in unseen]
    return {
        "vocabulary": len(kept),
        "vocabulary_teacher": before.vocab_size,
        "validation_tokens": longer[0] / longer[1],
    }


def _of_middle_length(rows: list[Encoded]) -> list[Encoded]:
    """At most CALIBRATION_ROWS rows that need little padding beside each other."""
    start = (len(rows) - min(CALIBRATION_ROWS, len(rows))) // 2
    return sorted(rows, key=lambda row: len(row.ids))[start : start + CALIBRATION_ROWS]
