"""Which device and which arithmetic train fastest here: measured, not assumed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from edgeft.tune.kernels import ROWS_ATTENTION, can_take_rows, use_few_pass_norms

PLAIN_TOKENS = 256


@dataclass(frozen=True)
class Compute:
    """Where and in which precision matrix products run; `gflops` holds the rates measured, in GFLOP/s."""

    device: torch.device
    dtype: torch.dtype
    gflops: dict[str, float]

    @property
    def name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    @property
    def rate(self) -> float:
        """The rate in GFLOP/s of large products in this precision."""
        return self.gflops[self.name]


def choose_compute(precision: str) -> Compute:
    """`precision` is auto, bf16 or fp32; auto times one typical matrix product in both and takes the faster.

    bf16 is four times as fast as fp32 on a core with AVX512-BF16 or AMX, and slower on one without.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    asked = dtypes if precision == "auto" else {precision: dtypes[precision]}
    rates = {name: gemm_gflops(dtype, device) for name, dtype in asked.items()}
    chosen = max(rates, key=lambda name: rates[name])
    return Compute(device, dtypes[chosen], {name: round(rate, 1) for name, rate in rates.items()})


def place(model: Any, compute: Compute, longest: int) -> Any:
    """Move a model to the compute device and precision, with the attention that is faster there.

    `longest` is the longest row in tokens. On a CPU torch's fused attention takes one to three times as long as
    plain products for rows of up to 256 tokens, forward and backward, and less from 512 on (benchmarks/LOG.md).
    """
    model.to(compute.device, compute.dtype)
    cpu = compute.device.type == "cpu"
    if cpu:
        use_few_pass_norms(model)
    plain = cpu and longest <= PLAIN_TOKENS
    model.set_attn_implementation("sdpa" if not plain else ROWS_ATTENTION if can_take_rows(model.config) else "eager")
    return model


def gemm_gflops(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Rate of [512, 1024] x [1024, 1024] products in GFLOP/s, best of the repetitions within `seconds`."""
    rows, width = 512, 1024
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, width, device=device).to(dtype)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    a @ b
    while best == float("inf") or time.perf_counter() < deadline:  # once at least, however busy the machine
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * rows * width * width / best / 1e9
