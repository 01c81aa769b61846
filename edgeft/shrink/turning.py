"""Depth cut by how little layers turn the hidden state: measured in one pass, without looking at the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from edgeft.shrink.importance import watch
from edgeft.tune.batches import Batch


@dataclass(frozen=True)
class Turn:
    """One removed layer and the change, from 0 to 1, by which it was chosen."""

    layer: int
    change: float


def least_influence(model: Any, keep: int, batches: Sequence[Batch]) -> list[Turn]:
    """The layers to remove, least first: 1 - mean cosine of what a layer is given and what it gives, each by itself.

    Block influence: ShortGPT (Men et al. 2024, arXiv:2403.03853).
    """
    change = [1 - float(cosine_N.mean()) for cosine_N in cosines(model, 1, batches)]
    order = sorted(range(len(change)), key=lambda layer: change[layer])
    return [Turn(layer, change[layer]) for layer in order[: len(order) - keep]]


def least_turning_block(model: Any, keep: int, batches: Sequence[Batch]) -> list[Turn]:
    """The layers to remove, neighbours: those that together turn the hidden state by the smallest mean angle, over pi.

    Angular distance: Gromov et al. 2024, arXiv:2403.17887, here over all tokens.
    """
    length = len(model.get_decoder().layers) - keep
    if length == 0:
        return []
    angles = [float(cosine_N.clamp(-1, 1).arccos().mean()) / math.pi for cosine_N in cosines(model, length, batches)]
    first = min(range(len(angles)), key=lambda start: angles[start])
    return [Turn(layer, angles[first]) for layer in range(first, first + length)]


@torch.no_grad()
def cosines(model: Any, length: int, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """[N] for each block of `length` layers, by its first: the cosine at every token of what goes in and comes out."""
    decoder = model.get_decoder()
    stations = {str(number): module for number, module in enumerate([*decoder.layers, decoder.norm])}
    given: dict[int, torch.Tensor] = {}
    found: list[list[torch.Tensor]] = [[] for _ in range(len(stations) - length)]

    def see(name: str, x_NC: torch.Tensor) -> None:
        number = int(name)
        given[number] = x_NC.float()
        if number >= length:
            found[number - length].append(F.cosine_similarity(given.pop(number - length), given[number], dim=1))

    watch(model, batches, stations, see)
    return [torch.cat(parts) for parts in found]
