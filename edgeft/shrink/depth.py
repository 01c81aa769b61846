"""Depth cut: a student made of some of the teacher's layers, those whose absence hurts least on the user's own rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgeft.errors import RecipeError
from edgeft.tune.batches import Batch


@dataclass(frozen=True)
class Cut:
    """One removed layer and the loss (nats per trained token) of what is left without it."""

    layer: int
    loss: float


@torch.no_grad()
def remove_least_needed(model: Any, keep: int, batch: Batch, on_cut: Callable[[], None] = lambda: None) -> list[Cut]:
    """Which layers to remove, one after the other, until `keep` are left; `model` itself is not changed.

    Greedy, each time the layer without which the loss on `batch` is lowest, as in SLEB (Song et al. 2024,
    arXiv:2402.09025). A loss measured in an earlier round stands for the present one until it would win, since removing
    more layers hardly ever makes another one less needed. Raises RecipeError if there are not `keep` layers.
    """
    total = len(model.get_decoder().layers)
    if not 1 <= keep <= total:
        raise RecipeError(f"student.layers is {keep}; the teacher has {total} layers", f"choose 1 to {total}")
    kept, cuts = list(range(total)), list[Cut]()
    losses = dict.fromkeys(kept, float("-inf"))
    while len(kept) > keep:
        stack, measured = _Stack(model, kept, batch), set[int]()
        while (weakest := min(kept, key=lambda layer: losses[layer])) not in measured:
            losses[weakest] = stack.loss_without(weakest)
            measured.add(weakest)
        kept.remove(weakest)
        cuts.append(Cut(weakest, losses[weakest]))
        on_cut()
    return cuts


class _Stack:
    """Some of a model's layers, run once; what a layer was given is kept, so that others can be left out after it."""

    def __init__(self, model: Any, kept: list[int], batch: Batch) -> None:
        self._model, self._decoder, self._kept, self._batch = model, model.get_decoder(), list(kept), batch
        self._given: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}
        every = self._decoder.layers
        hooks = [every[layer].register_forward_pre_hook(self._keeper(layer), with_kwargs=True) for layer in kept]
        try:
            self._decoder.layers = nn.ModuleList(every[layer] for layer in kept)
            self._decoder(batch.ids_BT, batch.attention_BT, use_cache=False)
        finally:
            self._decoder.layers = every
            for hook in hooks:
                hook.remove()

    def _keeper(self, layer: int) -> Any:
        def keep(_: nn.Module, args: tuple[torch.Tensor, ...], settings: dict[str, Any]) -> None:
            self._given[layer] = (args[0], settings)

        return keep

    def loss_without(self, left_out: int) -> float:
        """Mean cross-entropy (nats) per trained token without this layer; only the layers above it run again."""
        hidden_BTC, _ = self._given[left_out]
        for layer in self._kept[self._kept.index(left_out) + 1 :]:
            hidden_BTC = self._decoder.layers[layer](hidden_BTC, **self._given[layer][1])
        hidden_NC = self._decoder.norm(hidden_BTC).flatten(0, 1).index_select(0, self._batch.at_N)
        logits_NV = self._model.get_output_embeddings()(hidden_NC)
        return float(F.cross_entropy(logits_NV.float(), self._batch.labels_N))


def keep_layers(model: Any, layers: list[int]) -> Any:
    """A copy of a decoder-only model with only these layers, renumbered; embeddings and head are kept as they are."""
    student = copy.deepcopy(model)
    decoder = student.get_decoder()
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in layers)
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number  # the place of its keys and values in the cache
    student.config.num_hidden_layers = len(layers)
    for by_layer in ("layer_types", "no_rope_layers"):
        if entries := getattr(student.config, by_layer, None):
            setattr(student.config, by_layer, [entries[i] for i in layers])
    return student
