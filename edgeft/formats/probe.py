"""The frozen probe set: real rows and the logits that the torch model gives on their answers.

P positions over R rows, V the vocabulary. Every package of a model is compared with the same file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

FILE = "probe.safetensors"


@dataclass(frozen=True)
class Probe:
    """Teacher-forced rows with reference logits."""

    rows: list[list[int]]  # token ids of prompt and reference answer
    positions: list[list[int]]  # per row: indices whose logits predict an answer token
    logits_PV: NDArray[np.float32]  # all rows' positions, one after the other

    def next_ids(self) -> NDArray[np.int32]:
        """[P] the token that really follows each position."""
        return np.array([row[i + 1] for row, at in zip(self.rows, self.positions, strict=True) for i in at], np.int32)

    def save(self, folder: Path) -> None:
        save_file(
            {
                "ids": np.array([i for row in self.rows for i in row], np.int32),
                "row_len": np.array([len(row) for row in self.rows], np.int32),
                "positions": np.array([i for at in self.positions for i in at], np.int32),
                "row_positions": np.array([len(at) for at in self.positions], np.int32),
                "logits": np.ascontiguousarray(self.logits_PV),
            },
            folder / FILE,
        )

    @staticmethod
    def load(folder: Path) -> Probe:
        raw = load_file(folder / FILE)
        return Probe(
            [part.tolist() for part in np.split(raw["ids"], np.cumsum(raw["row_len"])[:-1])],
            [part.tolist() for part in np.split(raw["positions"], np.cumsum(raw["row_positions"])[:-1])],
            raw["logits"],
        )
