"""distill: the cut student healed on the teacher's cached probabilities and the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.artifact import Artifact
from edgeft.formats.hf import load_model, save_model
from edgeft.progress import Reporter
from edgeft.recipe import DistillSettings
from edgeft.shrink.vocabulary import VOCABULARY
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.features import FeatureMatching, in_teacher_ids
from edgeft.tune.learn import Lesson, learn
from edgeft.tune.losses import Distance, TeacherTopK, answer_logits, answer_loss
from edgeft.tune.precision import choose_compute, place
from edgeft.tune.targets import gather, load_shard, student_ids, translate
from edgeft.tune.validation import Validation, general_text, validate

STUDENT = "student"  # its name among the weights that are trained, if there are others


def run(cfg: DistillSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the raw student), targets, dataset, and teacher if its inside is matched.

    Writes the healed student and `history.json`.
    """
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    rows, validation = (
        load_encoded(inputs["dataset"].file(f"{split}.jsonl"), chat, cfg.max_tokens)
        for split in ("train", "validation")
    )
    index = inputs["targets"].read_json("index.json")
    targets = [row for shard in index["shards"] for row in load_shard(inputs["targets"].file(shard))]
    teacher_ids = None
    if (inputs["model"].path / VOCABULARY).is_file():
        vocabulary = inputs["model"].read_json(VOCABULARY)
        teacher_ids, student_ids_V = torch.tensor(vocabulary["teacher_ids"]), student_ids(**vocabulary)
        targets = [translate(row, student_ids_V) for row in targets]
    prefix = shared_tokens(rows)
    distance = Distance(cfg.divergence, cfg.skew, index["temperature"])
    compute = choose_compute(cfg.precision)
    longest = max(len(row.ids) for row in rows)
    model = place(load_model(inputs["model"].path, compute.dtype), compute, longest)
    for kept in (model.get_input_embeddings(), model.get_output_embeddings()):
        kept.requires_grad_(False)
    trained, inside = model, None
    if cfg.matches_inside:
        report.note("the teacher is in memory too, and runs in every step, since its inside is matched")
        teacher_model = place(load_model(inputs["teacher"].path, compute.dtype), compute, longest)
        inside = FeatureMatching(model, teacher_model, cfg.hidden_weight, cfg.attention_weight)
        trained = nn.ModuleDict({STUDENT: model, "inside": inside})

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix).to(compute.device)
        teacher = TeacherTopK(*(t.to(compute.device) for t in gather([targets[i] for i in numbers])))
        loss = answer_loss(answer_logits(model, batch), batch.labels_N, teacher, cfg.teacher_weight, distance)
        if inside:
            loss = loss + inside.loss(batch, in_teacher_ids(batch, teacher_ids))
        return loss, len(batch.labels_N), batch.num_tokens

    def look() -> Validation:
        return validate(model, validation, chat, compute.device)

    lesson = Lesson(model, trained, [len(row.ids) for row in rows], loss_of, look, compute)
    weights, facts = learn(lesson, cfg, out, report)
    if inside:  # the projections have done their work
        weights = {n.removeprefix(f"{STUDENT}."): w for n, w in weights.items() if n.startswith(f"{STUDENT}.")}
    healed: Any = load_model(inputs["model"].path, torch.float32)
    healed.load_state_dict(healed.state_dict() | weights)  # strict: a name that the student lacks is an error
    save_model(healed, out, inputs["model"].path)
    general = general_text(healed.to(compute.device, compute.dtype), chat, compute.device)
    report.note(f"general text: {general.bits_per_byte:.3f} bits per byte")
    return {**facts, "general": general._asdict()}
