"""What both sides of the comparison share: teacher, student, rows, settings, and the score of what was learned."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.formats.hf import load_model
from edgeft.learning_settings import DistillSettings
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, load_encoded
from edgeft.tune.precision import choose_compute, place
from edgeft.tune.validation import validate

SETTINGS = DistillSettings(epochs=1, lr=4e-4, batch_rows=8, evaluations=1, checkpoint_minutes=1e9, teacher_weight=1.0)


@dataclass(frozen=True)
class Job:
    """One run: folders of teacher, student, targets and dataset, how many of its rows, how many threads."""

    teacher: str
    student: str
    targets: str
    dataset: str
    rows: int
    threads: int

    @staticmethod
    def load(text: str) -> Job:
        return Job(**json.loads(text))

    def dump(self) -> str:
        return json.dumps(asdict(self))

    def tokens(self, split: str) -> tuple[ChatTokenizer, list[Encoded]]:
        """The split's rows as both sides train on them: token ids, and which of them are trained."""
        chat = ChatTokenizer.from_folder(Path(self.student))
        rows = load_encoded(Path(self.dataset) / f"{split}.jsonl", chat, SETTINGS.max_tokens)
        return chat, rows[: self.rows] if split == "train" else rows


def freeze_embeddings(student: Any) -> None:
    """On both sides the student keeps the teacher's embedding and head."""
    for kept in (student.get_input_embeddings(), student.get_output_embeddings()):
        kept.requires_grad_(False)


def score(job: Job, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Validation loss (cross-entropy on the labels) and exact match of the student with these weights."""
    chat, rows = job.tokens("validation")
    compute = choose_compute("auto")
    model: Any = load_model(Path(job.student), torch.float32)
    model.load_state_dict(model.state_dict() | weights)
    found = validate(place(model, compute, max(len(row.ids) for row in rows)), rows, chat, compute.device)
    return {"val_loss": found.loss, "exact_match": found.exact_match}
