"""Which shape to cut a student to, so that it decodes as fast as asked and keeps the most parameters.

Random weights of a shape are as fast as trained ones, so shapes are timed before any of them is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edgeft.errors import RecipeError

SHAPE = "shape.json"  # the layers and ffn that were found
MEASUREMENTS = 8  # shapes that are timed at most, some seconds each
STEP = 256  # FFN widths are multiples of it: the block of llama.cpp's k-quants


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide its speed."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding

    @staticmethod
    def of(config: dict[str, Any]) -> Shape:
        """Of a config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            ffn=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
        )

    @property
    def parameters(self) -> int:
        """Of the matrices; norms and biases are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.ffn) + embeddings

    def narrowed(self, vocabulary: int, hidden: int, kv_heads: int) -> Shape:
        """With so many tokens, channels and KV heads; each KV head keeps the query heads that share it."""
        heads = self.heads // self.kv_heads * kv_heads
        return replace(self, vocabulary=vocabulary, hidden=hidden, kv_heads=kv_heads, heads=heads)

    def into(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config.json of this shape, everything else as in `config`: a Llama's as a Mistral's, which computes the
        same, where transformers loads no such Llama."""
        changed: dict[str, Any] = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
        }
        if config.get("layer_types"):
            changed["layer_types"] = config["layer_types"][: self.layers]
        if config["model_type"] == "llama" and self.hidden % self.heads:
            changed |= {"model_type": "mistral", "sliding_window": None}
        return {**config, **changed}


@dataclass(frozen=True)
class Timed:
    """A shape and how many times as fast as the teacher it decodes."""

    shape: Shape
    speedup: float

    def record(self) -> dict[str, Any]:
        return {**asdict(self.shape), "parameters": self.shape.parameters, "speedup": self.speedup}


def find_shape(largest: Shape, speedup: float, time_shape: Callable[[Shape], float]) -> tuple[Timed, list[Timed]]:
    """The shape with the most parameters that decodes `speedup` times as fast, and all that were timed.

    Layers and FFN width vary, everything else is as in `largest`. `time_shape` says how many times as fast as the
    teacher a shape is. The time per token is taken as a sum of a constant, a part per layer, and a part per layer and
    FFN channel, fitted to what has been timed; the largest shape that should do is timed next, until none is left or
    MEASUREMENTS are done. Raises RecipeError if no timed shape is fast enough.
    """
    candidates = [
        replace(largest, layers=layers, ffn=ffn) for layers in range(1, largest.layers + 1) for ffn in _widths(largest)
    ]
    halves = replace(largest, layers=max(1, largest.layers // 2)), min(candidates, key=lambda s: s.parameters)
    timed = [Timed(shape, time_shape(shape)) for shape in dict.fromkeys((largest, *halves))]
    while len(timed) < MEASUREMENTS:
        hopeful = _hopeful(candidates, timed, speedup)
        if not hopeful:
            break
        shape = max(hopeful, key=lambda s: s.parameters)
        timed.append(Timed(shape, time_shape(shape)))
    fast = [one for one in timed if one.speedup >= speedup]
    if not fast:
        best = max(timed, key=lambda one: one.speedup)
        raise RecipeError(
            f"student.decode_speedup is {speedup}; the fastest shape, {best.shape.layers} layers with an FFN of "
            f"{best.shape.ffn}, reached {best.speedup:.2f}",
            "ask for less, or make embedding and head smaller with student.vocabulary",
        )
    return max(fast, key=lambda one: one.shape.parameters), timed


def _widths(largest: Shape) -> Sequence[int]:
    """FFN widths to choose from: the present one and all multiples of STEP below it."""
    return sorted({largest.ffn, *range(STEP, largest.ffn, STEP)})


def _hopeful(candidates: Sequence[Shape], timed: Sequence[Timed], speedup: float) -> list[Shape]:
    """Shapes that should be fast enough, and keep more than the best one that is known to be."""
    fast = [one.shape.parameters for one in timed if one.speedup >= speedup]
    slow = [one.shape for one in timed if one.speedup < speedup]
    cost = np.linalg.lstsq(
        np.array([_terms(one.shape) for one in timed]), np.array([1 / one.speedup for one in timed]), rcond=None
    )[0]
    return [
        shape
        for shape in candidates
        if shape.parameters > max(fast, default=0)
        and not any(shape.layers >= s.layers and shape.ffn >= s.ffn for s in slow)
        and float(np.dot(_terms(shape), cost)) <= 1 / speedup
    ]


def _terms(shape: Shape) -> tuple[float, float, float]:
    return 1.0, float(shape.layers), float(shape.layers * shape.ffn)
