"""The roofline of a package on a machine (Williams et al. 2009): the rates that memory and arithmetic allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeft.bench.footprint import Footprint


@dataclass(frozen=True)
class Ceiling:
    """What the machine was measured to do, and the tokens per second that follow for one package."""

    read_gbps: float
    gemm_gflops: float
    package: Footprint
    decode_tps: float  # every weight is read once per token
    prefill_tps: float  # in float32; narrower arithmetic may be faster

    def text(self) -> str:
        """One line, before the measurement."""
        return (
            f"ceiling: {self.package.decode_bytes / 1e6:,.0f} MB read per token at {self.read_gbps:.1f} GB/s give "
            f"at most {self.decode_tps:,.0f} tokens/s; {self.gemm_gflops:,.0f} GFLOP/s (float32) give "
            f"{self.prefill_tps:,.0f} tokens/s of prompt"
        )

    def reached(self, figures: dict[str, Any]) -> str:
        """One line, after it."""
        shares = self.shares(figures)
        return (
            f"reached: {figures['decode_tps']:,.0f} tokens/s, {shares['bandwidth_share']:.0%} of what memory gives; "
            f"{figures['prefill_tps']:,.0f} tokens/s of prompt, {shares['gemm_share']:.0%} of the arithmetic"
        )

    def shares(self, figures: dict[str, Any]) -> dict[str, float]:
        """Which share of the ceilings was reached, and what the package holds. A share above 1 means that the
        arithmetic was narrower (prefill) or that the weights stayed in a cache (decode)."""
        return {
            **self.package.figures(),
            "bandwidth_share": figures["decode_tps"] / self.decode_tps,
            "gemm_share": figures["prefill_tps"] / self.prefill_tps,
        }


def ceiling(package: Footprint, machine: dict[str, Any], prompt_tokens: int) -> Ceiling:
    """The ceiling of a package; the output head works for a prompt's last token alone."""
    flop = 2 * (sum(package.layers.values()) + sum(package.head.values()) / prompt_tokens)
    read, gemm = machine["read_gbps"], machine["gemm_gflops"]
    return Ceiling(read, gemm, package, read * 1e9 / package.decode_bytes, gemm * 1e9 / flop)
