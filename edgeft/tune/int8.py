"""Products with weights in 8 bits, several times as fast as in float32 on a CPU that multiplies integers (VNNI, AMX).

Inputs and gradients are rounded to 8 bits token by token (Dettmers et al. 2022, arXiv:2208.07339), and so are the
weights, which the gradient to the input meets in the same codes (SwitchBack, Wortsman et al. 2023, arXiv:2304.13013).
Everything else, the gradients to weights and adapters too, stays in floating point.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

LEVELS = 127
LEAST = 1e-20  # scale of a row of zeros


class _Scratch(threading.local):
    """Memory that is used again: for new memory of this size the system hands out pages one by one, each time."""

    def __init__(self) -> None:
        self.numbers = torch.empty(0)

    def like(self, values: torch.Tensor) -> torch.Tensor:
        if self.numbers.numel() < values.numel():
            self.numbers = torch.empty(values.numel())
        return self.numbers[: values.numel()].view(values.shape)


_scratch = _Scratch()


def to_codes(values: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [N, C] * factors [C] as int8 codes [N, C] and float32 scales [N, 1], in few passes over memory."""
    scaled = torch.mul(values, factors, out=_scratch.like(values))
    top = torch.maximum(scaled.amax(1, keepdim=True), scaled.amin(1, keepdim=True).neg_()).clamp_min_(LEAST)
    return scaled.mul_(LEVELS / top).round_().to(torch.int8), top.div_(LEVELS)


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] as rows[:, None] * codes * columns, O outputs and I inputs."""

    codes_OI: torch.Tensor
    rows_O: torch.Tensor
    columns_I: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor, columns_I: torch.Tensor) -> Int8Weight:
        codes, scales = to_codes(weight, 1 / columns_I)
        return Int8Weight(codes, scales[:, 0].contiguous(), columns_I)

    def times(self, x_NI: torch.Tensor) -> torch.Tensor:
        """x weight^T, [N, O], in x's type."""
        codes, scales = to_codes(x_NI, self.columns_I)
        return _floats(torch._int_mm(codes, self.codes_OI.t()), scales, self.rows_O, x_NI.dtype)

    def back(self, g_NO: torch.Tensor) -> torch.Tensor:
        """g weight, [N, I]: the gradient to the input of `times`."""
        codes, scales = to_codes(g_NO, self.rows_O)
        return _floats(torch._int_mm(codes, self.codes_OI), scales, self.columns_I, g_NO.dtype)


def _floats(sums: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sums [N, C] * scales [N, 1] * factors [C]; the integers give way to the floats where they stand."""
    return sums.view(torch.float32).copy_(sums).mul_(scales).mul_(factors).to(dtype)


class AdaptedProduct(torch.autograd.Function):
    """x [*, in] times a frozen weight and the adapter A [r, in], B [out, r] beside it, with gradients to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: Int8Weight, scale: float
    ) -> torch.Tensor:
        x_NI = x.flatten(0, -2)
        low_NR = (x_NI @ a.t()).mul_(scale)
        ctx.save_for_backward(x, a, b, low_NR)
        ctx.weight, ctx.scale = weight, scale
        return weight.times(x_NI).addmm_(low_NR, b.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None, None]:
        x, a, b, low_NR = ctx.saved_tensors
        g_NO = outer[0].flatten(0, -2)
        back_NR = (g_NO @ b).mul_(ctx.scale)
        to_x = ctx.weight.back(g_NO).addmm_(back_NR, a).view_as(x) if ctx.needs_input_grad[0] else None
        return to_x, back_NR.t() @ x.flatten(0, -2), (low_NR.t() @ g_NO).t(), None, None


class TrainedProduct(torch.autograd.Function):
    """x [*, in] times a weight that learns; its own gradient is a product in floating point."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, codes: Int8Weight) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.codes = codes
        return codes.times(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        g_NO = outer[0].flatten(0, -2)
        to_x = ctx.codes.back(g_NO).view_as(x) if ctx.needs_input_grad[0] else None
        return to_x, g_NO.t() @ x.flatten(0, -2), None
