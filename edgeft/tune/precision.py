"""Which device and which arithmetic train fastest here: measured, not assumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.errors import RecipeError
from edgeft.processes import is_helper, wait_until
from edgeft.tune.int8 import Int8Weight
from edgeft.tune.kernels import ROWS_ATTENTION, can_take_rows, use_few_passes

PLAIN_TOKENS = 256
FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLEARLY = 1.5  # times the rate of the faster floating-point type that int8 must reach to be taken
COMPUTE = "compute.json"
ROWS, WIDTH, SECONDS = 512, 1024, 0.2  # of the products that are timed


@dataclass(frozen=True)
class Compute:
    """Where and in which precision matrix products run; `gflops` holds the rates measured, in GFLOP/s.

    `int8`: products with weights multiply integers (`tune.int8`), everything else is of `dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    gflops: dict[str, float]
    int8: bool = False

    @property
    def name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    @property
    def described(self) -> str:
        """For people."""
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in self.gflops.items())
        products = "int8 products, all else " * self.int8
        return f"{products}{self.name} on {self.device.type}; measured rates of products in GFLOP/s: {rates}"

    @property
    def rate(self) -> float:
        """The rate in GFLOP/s of large products in the floating-point type."""
        return self.gflops[self.name]


def choose_compute(precision: str, frozen: bool = False) -> Compute:
    """`precision` is auto, int8, bf16 or fp32; auto times one typical matrix product in each and takes the fastest.

    bf16 is four times as fast as fp32 on a core with AVX512-BF16 or AMX, and slower on one without. int8, for which
    rounding the input is timed too, must win clearly, so that a disturbed measurement decides nothing; auto takes it
    for `frozen` weights alone: those that learn are rounded anew in every step and gain a seventh (benchmarks/LOG.md).
    """
    device = best_device()
    if precision == "int8" and device.type != "cpu":
        raise RecipeError("precision: int8 is for CPUs, and this machine trains on a GPU", "leave precision at auto")
    asked = {precision: FLOATS[precision]} if precision in FLOATS else FLOATS
    rates = {name: gemm_gflops(dtype, device) for name, dtype in asked.items()}
    chosen = max(rates, key=lambda name: rates[name])
    if int8 := device.type == "cpu" and (precision == "int8" or (precision == "auto" and frozen)):
        rates["int8"] = int8_gflops()
        int8 = precision == "int8" or rates["int8"] > CLEARLY * rates[chosen]
    return Compute(device, FLOATS[chosen], {name: round(rate, 1) for name, rate in rates.items()}, int8)


def settled_compute(folder: Path, precision: str, frozen: bool = False) -> Compute:
    """`choose_compute`'s choice as `folder`, a stage's checkpoints, keeps it, made here if it is not there yet.

    A try that goes on where another was killed, and all processes of one `accelerate launch`, must compute alike, and
    a measurement repeated on a busier machine may turn out otherwise.
    """
    path, device = folder / COMPUTE, best_device()
    if is_helper():
        wait_until(lambda: _kept(path, device) is not None)
    if (kept := _kept(path, device)) is not None:
        return kept
    compute = choose_compute(precision, frozen)
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps({"device": device.type, "dtype": compute.name, "gflops": compute.gflops,
                                  "int8": compute.int8}), "utf-8")  # fmt: skip
    beside.replace(path)
    return compute


def _kept(path: Path, device: torch.device) -> Compute | None:
    """What was chosen for this device."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text("utf-8"))
    if kept["device"] != device.type:
        return None
    return Compute(device, FLOATS[kept["dtype"]], kept["gflops"], kept["int8"])


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(model: Any, compute: Compute, longest: int) -> Any:
    """Move a model to the compute device and precision, with the attention that is faster there.

    `longest` is the longest row in tokens. On a CPU torch's fused attention takes one to three times as long as
    plain products for rows of up to 256 tokens, forward and backward, and less from 512 on (benchmarks/LOG.md).
    """
    model.to(compute.device, compute.dtype)
    cpu = compute.device.type == "cpu"
    if cpu:
        use_few_passes(model)
    plain = cpu and longest <= PLAIN_TOKENS
    model.set_attn_implementation("sdpa" if not plain else ROWS_ATTENTION if can_take_rows(model.config) else "eager")
    return model


def gemm_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """Rate of [512, 1024] x [1024, 1024] products in GFLOP/s."""
    a = torch.randn(ROWS, WIDTH, device=device).to(dtype)
    b = torch.randn(WIDTH, WIDTH, device=device).to(dtype)

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _gflops(product)


def int8_gflops() -> float:
    """The same rate with the weight in 8 bits, its input in float32 and rounded for each product."""
    x, weight = torch.randn(ROWS, WIDTH), Int8Weight.of(torch.randn(WIDTH, WIDTH), torch.ones(WIDTH))
    return _gflops(lambda: weight.times(x))


def _gflops(product: Callable[[], Any]) -> float:
    """Best of the repetitions within SECONDS."""
    best, deadline = float("inf"), time.perf_counter() + SECONDS
    product()
    while best == float("inf") or time.perf_counter() < deadline:  # once at least, however busy the machine
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * ROWS * WIDTH * WIDTH / best / 1e9
