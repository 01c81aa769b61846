"""Depth cut: a student made of some of the teacher's layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from edgeft.errors import RecipeError


def spaced_layers(total: int, keep: int) -> list[int]:
    """`keep` of `total` layer numbers, evenly spaced, the first and the last among them.

    Raises RecipeError if there are not that many.
    """
    if not 2 <= keep <= total:
        raise RecipeError(f"student.layers is {keep}; the teacher has {total} layers", f"choose 2 to {total}")
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def keep_layers(model: Any, layers: list[int]) -> Any:
    """A copy of a decoder-only model with only these layers, renumbered; embeddings and head are kept as they are."""
    student = copy.deepcopy(model)
    decoder = student.get_decoder()
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in layers)
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number  # the place of its keys and values in the cache
    student.config.num_hidden_layers = len(layers)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in layers]
    return student
