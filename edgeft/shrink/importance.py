"""How much the parts of a model's width matter on given rows, by what they contribute to what reads them.

N tokens, C channels of the hidden state, F channels of a feed-forward, G key-value heads, each with its query heads.
Activation times the norm of the weights that read it: Wanda (Sun et al. 2023, arXiv:2306.11695); for whole channels and
heads: Minitron (Muralidharan et al. 2024, arXiv:2407.14679).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeft.tune.batches import Batch


def watch(
    model: Any, batches: Sequence[Batch], modules: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]
) -> None:
    """Run the rows through the decoder; `see` gets what each of `modules` is given, [N, width], padding left out."""
    own = torch.empty(0)

    def watcher(name: str) -> Any:
        def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            see(name, args[0].flatten(0, -2).index_select(0, own))

        return look

    hooks = [module.register_forward_pre_hook(watcher(name)) for name, module in modules.items()]
    try:
        for batch in batches:
            own = batch.attention_BT.flatten().nonzero().squeeze(1)
            model.get_decoder()(batch.ids_BT, batch.attention_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def ffn_importance(model: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """[F] for each layer: the mean length of what each feed-forward channel adds to the hidden state."""
    down = {str(number): layer.mlp.down_proj for number, layer in enumerate(model.get_decoder().layers)}
    size = {name: torch.zeros(linear.in_features, device=linear.weight.device) for name, linear in down.items()}

    def see(name: str, x_NF: torch.Tensor) -> None:
        size[name].add_(x_NF.float().abs().sum(0))

    watch(model, batches, down, see)
    tokens = sum(batch.num_tokens for batch in batches)
    return [size[name] / tokens * linear.weight.float().norm(dim=0) for name, linear in down.items()]


@torch.no_grad()
def group_importance(model: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """[G] for each layer: the mean length of what each key-value head's query heads add to the hidden state."""
    out = {str(number): layer.self_attn.o_proj for number, layer in enumerate(model.get_decoder().layers)}
    groups = model.config.num_key_value_heads
    size = {name: torch.zeros(groups, device=linear.weight.device) for name, linear in out.items()}

    def see(name: str, x_NA: torch.Tensor) -> None:
        weight_CA = out[name].weight
        parts = zip(x_NA.chunk(groups, 1), weight_CA.chunk(groups, 1), strict=True)
        size[name].add_(torch.stack([(x @ weight.T).float().norm(dim=1).sum() for x, weight in parts]))

    watch(model, batches, out, see)
    tokens = sum(batch.num_tokens for batch in batches)
    return [size[name] / tokens for name in out]


@torch.no_grad()
def hidden_importance(model: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """[C]: mean over tokens and norms of a channel's share in what the norm is given, |x| by the root mean square.

    On a real model this lost less than what the norm gives, with or without the weights that read it
    (benchmarks/LOG.md).
    """
    norms = dict(norms_of(model))
    total_C = torch.zeros_like(norms["last"].weight, dtype=torch.float32)

    def see(name: str, x_NC: torch.Tensor) -> None:
        total_C.add_((x_NC.float().abs() / _rms(x_NC, norms[name].variance_epsilon)).sum(0))

    watch(model, batches, norms, see)
    return total_C / (len(norms) * sum(batch.num_tokens for batch in batches))


@torch.no_grad()
def norm_factors(model: Any, batches: Sequence[Batch], channels: torch.Tensor) -> dict[str, float]:
    """For each norm by name: mean over tokens of the root mean square of these channels by that of all.

    A norm divides by the root mean square of the channels it sees; multiplied by this factor, fewer of them come out
    on average as they did among all.
    """
    norms = dict(norms_of(model))
    sums = dict.fromkeys(norms, 0.0)

    def see(name: str, x_NC: torch.Tensor) -> None:
        epsilon = norms[name].variance_epsilon
        sums[name] += float((_rms(x_NC[:, channels], epsilon) / _rms(x_NC, epsilon)).sum())

    watch(model, batches, norms, see)
    tokens = sum(batch.num_tokens for batch in batches)
    return {name: total / tokens for name, total in sums.items()}


def norms_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Every norm of the hidden state, by name."""
    for number, layer in enumerate(model.get_decoder().layers):
        yield f"{number}.attention", layer.input_layernorm
        yield f"{number}.mlp", layer.post_attention_layernorm
    yield "last", model.get_decoder().norm


def _rms(x_NC: torch.Tensor, epsilon: float) -> torch.Tensor:
    """[N, 1]"""
    return (x_NC.float().square().mean(1, keepdim=True) + epsilon).sqrt()
