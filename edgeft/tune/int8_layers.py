"""Linear layers that compute in 8 bits while they learn, or while an adapter beside them does.

A few input channels are far larger than all others; part of their size is moved into the weight, so that rounding a
token leaves the small ones something (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from edgeft.tune.int8 import AdaptedProduct, Int8Weight, TrainedProduct
from edgeft.tune.qlora import FoldedLora, unpack

MOVED, MOST = 0.5, 3.0  # the power of a channel's largest input that moves into the weight, and at most how much
EXAMPLE_ROWS = 8  # that show how large
LEAST = 1e-6  # size of a channel that is always zero


class Int8Lora(FoldedLora):
    """PEFT's LoRA linear with its frozen weight in 8 bits; the adapter is computed beside it, exactly."""

    _int8: Int8Weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        a, b = (cast("torch.Tensor", side["default"].weight) for side in (self.lora_A, self.lora_B))
        product: torch.Tensor = AdaptedProduct.apply(x, a, b, self._int8, self.scaling["default"])  # type: ignore[no-untyped-call]
        bias = cast("Any", self.get_base_layer()).bias
        return product if bias is None else product + bias


class Int8Linear(nn.Linear):
    """A linear that learns, computed in codes that are made anew when its weight has changed."""

    _columns: torch.Tensor
    _int8: Int8Weight
    _int8_from: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._int8_from != self.weight._version:
            self._int8, self._int8_from = Int8Weight.of(self.weight.detach(), self._columns), self.weight._version
        product: torch.Tensor = TrainedProduct.apply(x, self.weight, self._int8)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


@torch.no_grad()
def use_int8(model: Any, kind: type[nn.Module], example: Callable[[], Any]) -> None:
    """Let the linears of this kind, FoldedLora or nn.Linear, in a language model's decoder compute in 8 bits, in place.

    Not so its output head: of the gradient to the logits, one label beside thousands of small probabilities, 127 steps
    leave only the label, and the loss falls far more slowly. `example` runs the model on a few rows, always the same,
    to show how large each input channel becomes.
    """
    chosen = [module for module in model.get_decoder().modules() if type(module) is kind]
    tops: dict[nn.Module, torch.Tensor] = {}

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        top = inputs[0].flatten(0, -2).abs().amax(0).float()
        tops[module] = torch.maximum(tops[module], top) if module in tops else top

    watching = [module.register_forward_pre_hook(look) for module in chosen]
    example()
    for watch in watching:
        watch.remove()
    for module, top in tops.items():  # what no row reaches stays as it is
        size = top.clamp_min(LEAST).pow(MOVED)
        columns = 1 / (size / size.median()).clamp(1 / MOST, MOST)
        if isinstance(module, FoldedLora):
            _freeze(module, columns)
        else:
            linear: Any = module
            linear._columns, linear.__class__ = columns, Int8Linear


def _freeze(module: Any, columns: torch.Tensor) -> None:
    """The base's weight, 4-bit or not, gives way to its codes."""
    base, packed = module.get_base_layer(), module._packed
    frozen = base.weight if packed is None else unpack(packed, torch.float32)
    module._int8, module._packed = Int8Weight.of(frozen, columns), None
    base.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    del module._folded
    module.__class__ = Int8Lora
