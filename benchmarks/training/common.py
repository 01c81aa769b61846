"""What both sides of the comparison share: the rows, the settings, and the score of what was learned."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.formats.hf import load_model
from edgeft.learning_settings import TrainSettings
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, load_encoded
from edgeft.tune.precision import choose_compute, place
from edgeft.tune.qlora import FourBits, adapter_targets, dequantized_base, fold_adapter
from edgeft.tune.validation import validate

SETTINGS = TrainSettings(epochs=1, lr=1e-3, batch_rows=8, evaluations=1, checkpoint_minutes=1e9)


@dataclass(frozen=True)
class Job:
    """One training run: the base model, the dataset artifact's folder, how many of its rows, how many threads."""

    base: str
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
        chat = ChatTokenizer.from_folder(Path(self.base))
        rows = load_encoded(Path(self.dataset) / f"{split}.jsonl", chat, SETTINGS.max_tokens)
        return chat, rows[: self.rows] if split == "train" else rows


def score(job: Job, adapter: dict[str, torch.Tensor]) -> dict[str, float]:
    """Validation loss and exact match of an adapter in PEFT's names, merged into the 4-bit base it was trained on."""
    chat, rows = job.tokens("validation")
    compute = choose_compute("auto")
    model: Any = load_model(Path(job.base), torch.float32)
    dequantized_base(model, FourBits())
    fold_adapter(model, adapter, SETTINGS.scale, adapter_targets(model, SETTINGS.target_modules, None))
    found = validate(place(model, compute, max(len(row.ids) for row in rows)), rows, chat, compute.device)
    return {"val_loss": found.loss, "exact_match": found.exact_match}
