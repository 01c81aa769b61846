"""distill: the student learns from the teacher, its cached probabilities or its own answers, and from the labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.artifact import CHECKPOINT_DIR, Artifact
from edgeft.errors import ModelError
from edgeft.formats.hf import load_model, save_model
from edgeft.learning_settings import DistillSettings
from edgeft.progress import Reporter
from edgeft.shrink.vocabulary import VOCABULARY
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import ANSWERS, load_encoded
from edgeft.tune.batches import epoch_batches, shared_tokens
from edgeft.tune.distil_loss import DistilLoss, Material
from edgeft.tune.features import FeatureMatching
from edgeft.tune.int8_layers import EXAMPLE_ROWS, use_int8
from edgeft.tune.learn import Lesson, learn
from edgeft.tune.losses import Distance
from edgeft.tune.on_policy import LiveTeacher, OnPolicy, Vocabulary, cost
from edgeft.tune.precision import Compute, place, settled_compute
from edgeft.tune.sequence import mix
from edgeft.tune.targets import load_shard, student_ids, translate
from edgeft.tune.validation import Validation, general_text, validate

STUDENT = "student"  # its name among the weights that are trained, if there are others


def run(cfg: DistillSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the raw student), dataset, targets unless it learns answers, and teacher if it must be in memory.

    Writes the healed student and `history.json`.
    """
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    vocabulary = _vocabulary(inputs["model"])
    material = _material(cfg, inputs, chat, vocabulary)
    validation = load_encoded(inputs["dataset"].file("validation.jsonl"), chat, cfg.max_tokens)
    compute = settled_compute(out / CHECKPOINT_DIR, cfg.precision)
    lengths = [len(row.ids) for row in material.rows]
    model = place(load_model(inputs["model"].path, compute.dtype), compute, max(lengths))
    for kept in (model.get_input_embeddings(), model.get_output_embeddings()):
        kept.requires_grad_(False)
    trained, loss_of = model, _loss(cfg, inputs, model, chat, material, vocabulary, compute)
    report.note(compute.described)
    if compute.int8:
        use_int8(model, nn.Linear, lambda: loss_of.on(range(min(len(lengths), EXAMPLE_ROWS)), False))
    if loss_of.inside:
        report.note("the teacher is in memory too, and runs in every step, since its inside is matched")
        trained = nn.ModuleDict({STUDENT: model, "inside": loss_of.inside})
    expense = None
    if loss_of.live:
        expense = cost(model, loss_of.on, epoch_batches(lengths, cfg.batch_rows, cfg.seed, 0)[0], cfg.on_policy)
        report.note(f"on-policy: {expense}")

    def look() -> Validation:
        return validate(model, validation, chat, compute.device)

    lesson = Lesson(model, trained, lengths, loss_of, look, compute)
    weights, facts = learn(lesson, cfg, out, report)
    if loss_of.inside:  # the projections have done their work
        weights = {n.removeprefix(f"{STUDENT}."): w for n, w in weights.items() if n.startswith(f"{STUDENT}.")}
    healed: Any = load_model(inputs["model"].path, torch.float32)
    healed.load_state_dict(healed.state_dict() | weights)  # strict: a name that the student lacks is an error
    save_model(healed, out, inputs["model"].path)
    general = general_text(healed.to(compute.device, compute.dtype), chat, compute.device)
    report.note(f"general text: {general.bits_per_byte:.3f} bits per byte")
    return {**facts, **({"on_policy": expense._asdict()} if expense else {}), "general": general._asdict()}


def _material(
    cfg: DistillSettings, inputs: dict[str, Artifact], chat: ChatTokenizer, known: Vocabulary | None
) -> Material:
    rows = load_encoded(inputs["dataset"].file("train.jsonl"), chat, cfg.max_tokens)
    if "targets" not in inputs:
        mixed, weights = mix(rows, inputs["dataset"].read_json(ANSWERS)["labelled"], cfg.teacher_weight)
        return Material(mixed, None, weights, shared_tokens(mixed))
    shards = inputs["targets"].read_json("index.json")["shards"]
    targets = [row for shard in shards for row in load_shard(inputs["targets"].file(shard))]
    if known:
        student_ids_V = student_ids(known.teacher_ids, known.teacher_vocab_size)
        targets = [translate(row, student_ids_V) for row in targets]
    differing = sum(sum(row.trained) != len(kept.tail_N) for row, kept in zip(rows, targets, strict=True))
    if differing:
        raise ModelError(
            f"the student cuts {differing} of {len(rows)} training rows into other tokens than the teacher",
            "set targets.kind: answers, or take out the special tokens that only the teacher knows",
        )
    return Material(rows, targets, None, shared_tokens(rows))


def _vocabulary(student: Artifact) -> Vocabulary | None:
    """The teacher's ids of the student's tokens, if they are others than the student's."""
    return Vocabulary(**student.read_json(VOCABULARY)) if VOCABULARY in student.manifest.files else None


def _loss(
    cfg: DistillSettings, inputs: dict[str, Artifact], model: Any, chat: ChatTokenizer, material: Material,
    known: Vocabulary | None, compute: Compute,
) -> DistilLoss:  # fmt: skip
    """What is minimised, with the teacher in memory if it must be; that is asked as it was for the cached targets."""
    index: dict[str, Any] = inputs["targets"].read_json("index.json") if "targets" in inputs else {}
    distance = Distance(cfg.divergence, cfg.skew, index.get("temperature", 1.0))
    loss = DistilLoss(model, material, chat.pad_id, chat.end_id, cfg.teacher_weight, distance, compute.device)
    if not cfg.needs_teacher:
        return loss
    longest, folder = max(len(row.ids) for row in material.rows), inputs["teacher"].path
    teacher = place(load_model(folder, compute.dtype), compute, longest).requires_grad_(False).eval()
    inside, live, teacher_ids = None, None, torch.tensor(known.teacher_ids, device=compute.device) if known else None
    if cfg.matches_inside:
        inside = FeatureMatching(model, teacher, cfg.hidden_weight, cfg.attention_weight)
    if cfg.on_policy:
        end_id = ChatTokenizer.from_folder(folder).end_id
        scorer = LiveTeacher(teacher, index["top_k"], distance.temperature, end_id, known)
        live = OnPolicy.of(model, chat, material.rows, scorer)
    return replace(loss, live=live, own_turns=cfg.on_policy, inside=inside, teacher_ids=teacher_ids)
