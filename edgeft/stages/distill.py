"""distill: the cut student healed on the teacher's cached probabilities and the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgeft.artifact import Artifact
from edgeft.formats.hf import load_model, save_model
from edgeft.progress import Reporter
from edgeft.recipe import DistillSettings
from edgeft.shrink.vocabulary import VOCABULARY
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.learn import Lesson, learn
from edgeft.tune.losses import Distance, TeacherTopK, answer_logits, answer_loss
from edgeft.tune.precision import choose_compute, place
from edgeft.tune.targets import gather, load_shard, student_ids, translate
from edgeft.tune.validation import Validation, general_text, validate


def run(cfg: DistillSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the raw student), targets, dataset. Writes the healed student and `history.json`."""
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    rows, validation = (
        load_encoded(inputs["dataset"].file(f"{split}.jsonl"), chat, cfg.max_tokens)
        for split in ("train", "validation")
    )
    index = inputs["targets"].read_json("index.json")
    targets = [row for shard in index["shards"] for row in load_shard(inputs["targets"].file(shard))]
    if (inputs["model"].path / VOCABULARY).is_file():
        student_ids_V = student_ids(**inputs["model"].read_json(VOCABULARY))
        targets = [translate(row, student_ids_V) for row in targets]
    prefix = shared_tokens(rows)
    distance = Distance(cfg.divergence, cfg.skew, index["temperature"])
    compute = choose_compute(cfg.precision)
    model = place(load_model(inputs["model"].path, compute.dtype), compute, max(len(row.ids) for row in rows))
    for kept in (model.get_input_embeddings(), model.get_output_embeddings()):
        kept.requires_grad_(False)

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix).to(compute.device)
        teacher = TeacherTopK(*(t.to(compute.device) for t in gather([targets[i] for i in numbers])))
        loss = answer_loss(answer_logits(model, batch), batch.labels_N, teacher, cfg.teacher_weight, distance)
        return loss, len(batch.labels_N), batch.num_tokens

    def look() -> Validation:
        return validate(model, validation, chat, compute.device)

    lesson = Lesson(model, model, [len(row.ids) for row in rows], loss_of, look, compute)
    weights, facts = learn(lesson, cfg, out, report)
    healed: Any = load_model(inputs["model"].path, torch.float32)
    healed.load_state_dict(healed.state_dict() | weights)  # strict: a name that the student lacks is an error
    save_model(healed, out, inputs["model"].path)
    general = general_text(healed.to(compute.device, compute.dtype), chat, compute.device)
    report.note(f"general text: {general.bits_per_byte:.3f} bits per byte")
    return {**facts, "general": general._asdict()}
