"""The tensors of a Hugging Face folder as numpy arrays, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - lets numpy hold bfloat16, which many checkpoints are stored in
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from edgeft.errors import ModelError
from edgeft.formats.hf import read_config


class Weights:
    """Tensors by name; each is read when it is asked for."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._files = files  # tensor name -> open file
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(f.get_slice(n).get_shape()) for n, f in files.items()}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self._files[name].get_tensor(name)).astype(np.float32, copy=False)


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """The tensors of `folder`, from one file or from shards; a stored copy of a tied head is left out.

    Raises ModelError if there are none.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}", "name the folder of a model in the safetensors format")
    tied = read_config(folder).get("tie_word_embeddings", False)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(folder / name, framework="numpy")) for name in names]
        files = {tensor: f for f in opened for tensor in list(f.keys())}
        if tied:
            files.pop("lm_head.weight", None)
        yield Weights(dict(sorted(files.items())))
