"""Forward + backward of one attention layer in bf16: torch's fused kernel against plain products, CPU ms.

Run: OMP_NUM_THREADS=1 python benchmarks/attention.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

HEADS, WIDTH, REPEATS = 9, 64, 9  # SmolLM2-135M
SHAPES = [(16, 64), (16, 96), (16, 192), (8, 256), (4, 512), (2, 1024)]  # rows, tokens


def cpu_ms(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return 1000 * (time.process_time() - start)


def main() -> None:
    print("rows tokens  fused_ms  plain_ms  ratio (medians, interleaved, n =", REPEATS, end=")\n")
    for rows, tokens in SHAPES:
        q, k, v = (torch.randn(rows, HEADS, tokens, WIDTH).bfloat16().requires_grad_() for _ in range(3))
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
        added = torch.zeros(rows, 1, tokens, tokens).masked_fill(~allowed, -1e9).bfloat16()

        def fused(q=q, k=k, v=v, added=added) -> None:  # type: ignore[no-untyped-def]
            F.scaled_dot_product_attention(q, k, v, attn_mask=added).sum().backward()

        def plain(q=q, k=k, v=v, added=added) -> None:  # type: ignore[no-untyped-def]
            scores = torch.matmul(q, k.transpose(2, 3)) * WIDTH**-0.5 + added
            torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v).sum().backward()

        for function in (fused, plain):
            function()
        times = [(cpu_ms(fused), cpu_ms(plain)) for _ in range(REPEATS)]
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{rows:4d} {tokens:6d} {a:9.1f} {b:9.1f} {a / b:6.2f}", flush=True)


if __name__ == "__main__":
    main()
