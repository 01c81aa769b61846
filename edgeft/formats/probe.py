"""The frozen probe set: real rows, general text, and what the torch model predicts and answers there.

P positions over R rows, V the vocabulary. Every package of a model is compared with the same file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

FILE = "probe.safetensors"
LOGITS = "logits"


@dataclass(frozen=True)
class Probe:
    """Teacher-forced rows with reference logits, the rows of general text last; the model's own greedy answers."""

    rows: list[list[int]]  # token ids of prompt and reference answer
    positions: list[list[int]]  # per row: indices whose logits predict an answer token
    logits_PV: NDArray[np.float32]  # all rows' positions, one after the other
    numbers: list[int] = field(default_factory=list)  # of each row in its split, from 1
    general_rows: int = 0
    greedy: list[list[int]] = field(default_factory=list)  # answers to the first rows' prompts, without stop token
    greedy_limit: int = 0  # longest answer in tokens

    @property
    def task_rows(self) -> int:
        """How many rows, the first ones, come from the validation split."""
        return len(self.rows) - self.general_rows

    def where(self, row: int) -> str:
        """What people find a row by: its split and its number there, from 1."""
        number = self.numbers[row] if self.numbers else row + 1
        return f"{'validation' if row < self.task_rows else 'general'}:{number}"

    def prompt(self, row: int) -> list[int]:
        """The tokens before the row's first answer."""
        return self.rows[row][: self.positions[row][0] + 1]

    def next_ids(self) -> NDArray[np.int32]:
        """[P] the token that really follows each position."""
        return np.array([row[i + 1] for row, at in zip(self.rows, self.positions, strict=True) for i in at], np.int32)

    def save(self, folder: Path) -> None:
        lists = {"row": self.rows, "positions": self.positions, "greedy": self.greedy}
        tensors: dict[str, NDArray[Any]] = {LOGITS: np.ascontiguousarray(self.logits_PV)}
        for name, parts in lists.items():
            tensors[f"{name}_ids"] = np.array([i for part in parts for i in part], np.int32)
            tensors[f"{name}_len"] = np.array([len(part) for part in parts], np.int32)
        tensors["numbers"] = np.array(self.numbers, np.int32)
        tensors["counts"] = np.array([self.general_rows, self.greedy_limit], np.int32)
        save_file(tensors, folder / FILE)

    @staticmethod
    def load(folder: Path) -> Probe:
        """The logits stay on disk until they are looked at: they may be larger than the model."""
        with safe_open(folder / FILE, framework="numpy") as f:
            raw = {name: f.get_tensor(name) for name in set(f.keys()) - {LOGITS}}
        rows, positions, greedy = (_split(raw, name) for name in ("row", "positions", "greedy"))
        general_rows, greedy_limit = map(int, raw["counts"])
        logits_PV = _mapped(folder / FILE, LOGITS)
        return Probe(rows, positions, logits_PV, raw["numbers"].tolist(), general_rows, greedy, greedy_limit)


def _split(raw: dict[str, NDArray[Any]], name: str) -> list[list[int]]:
    ends = np.cumsum(raw[f"{name}_len"])
    return [part.tolist() for part in np.split(raw[f"{name}_ids"], ends)[:-1]]


def _mapped(path: Path, name: str) -> NDArray[np.float32]:
    """A float32 tensor of a safetensors file (8 bytes of header length, the header, the tensors), mapped read only."""
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        entry = json.loads(f.read(length))[name]
    start, _ = entry["data_offsets"]
    return np.memmap(path, np.float32, "r", 8 + length + start, tuple(entry["shape"]))
