"""train: the teacher learns the dataset's rows, by default as a QLoRA adapter over the 4-bit base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.artifact import CHECKPOINT_DIR, Artifact
from edgeft.formats.hf import load_model
from edgeft.learning_settings import TrainSettings
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import REPLAY, load_encoded
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.int8_layers import EXAMPLE_ROWS, use_int8
from edgeft.tune.learn import Lesson, learn
from edgeft.tune.losses import batch_loss
from edgeft.tune.methods import Learner, make_learner, save_learned
from edgeft.tune.precision import Compute, settled_compute
from edgeft.tune.qlora import FoldedLora
from edgeft.tune.validation import Validation, validate


def prepare(
    cfg: TrainSettings, compute: Compute, model: Path, dataset: Artifact, report: Reporter
) -> tuple[Lesson, Learner]:
    """Load model and rows as a run of this stage does."""
    chat = ChatTokenizer.from_folder(model)
    rows, validation = (
        load_encoded(dataset.file(f"{split}.jsonl"), chat, cfg.max_tokens) for split in ("train", "validation")
    )
    prefix, own = shared_tokens(rows), len(rows)
    if REPLAY in dataset.manifest.files:
        rows += load_encoded(dataset.file(REPLAY), chat, cfg.max_tokens)
    lengths = [len(row.ids) for row in rows]
    report.note(compute.described)
    learner = make_learner(load_model(model, torch.float32), cfg, compute, max(lengths))

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        loss, trained, tokens = torch.zeros((), device=compute.device), 0, 0
        replayed = [i for i in numbers if i >= own]  # they do not begin as the others do
        for part, shared in (([i for i in numbers if i < own], prefix), (replayed, 0)):
            if part:
                batch = collate([rows[i] for i in part], chat.pad_id, shared).to(compute.device)
                loss = loss + batch_loss(learner.model, batch)
                trained, tokens = trained + len(batch.labels_N), tokens + batch.num_tokens
        return loss, trained, tokens

    if compute.int8:
        kind = nn.Linear if cfg.method == "full" else FoldedLora
        use_int8(learner.model, kind, lambda: loss_of(range(min(own, EXAMPLE_ROWS))))

    def look() -> Validation:
        return validate(learner.model, validation, chat, compute.device)

    return Lesson(learner.model, learner.trained, lengths, loss_of, look, compute), learner


def run(cfg: TrainSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset. Writes what was learned (`save_learned`) and `history.json`."""
    compute = settled_compute(out / CHECKPOINT_DIR, cfg.precision, cfg.base_is_frozen)
    lesson, learner = prepare(cfg, compute, inputs["model"].path, inputs["dataset"], report)
    weights, facts = learn(lesson, cfg, out, report)
    save_learned(learner, cfg, weights, f"sha256:{inputs['model'].digest}", out)
    return {"trainable_parameters": sum(w.numel() for w in weights.values()), **facts}
