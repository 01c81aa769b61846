"""The file that says how much each input channel of each matrix of a model carries: `importance.safetensors`.

{Hugging Face tensor name: float32 [in_features]}, the mean squared input; metadata `rows` and `tokens` tell over how
many. The output head stands under lm_head.weight, even if it shares the embedding's weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

FILE = "importance.safetensors"
HEAD = "lm_head.weight"

Importance = dict[str, NDArray[np.float32]]


def save_importance(folder: Path, importance: Importance, rows: int, tokens: int) -> None:
    """Write the file into `folder`."""
    save_file(importance, folder / FILE, metadata={"rows": str(rows), "tokens": str(tokens)})


def load_importance(folder: Path) -> Importance:
    """Read the file of an importance artifact."""
    importance: Importance = load_file(folder / FILE)
    return importance
