"""`python -m edgeft.bench.machine`: how fast this machine reads memory and multiplies, as one JSON line.

A process of its own, so that its arrays do not count for a package, with the threads that BLAS was given in the
environment. The best of several tries counts, as in STREAM (McCalpin 1995): it is to be a ceiling.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

READ_BYTES = 1 << 28  # of float32: more than the caches of a few cores hold
WIDTH = 1024  # of the matrix that is read
SIDE = 1536  # of the square matrices
BUDGET_S = 0.6
THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def probe(threads: int) -> dict[str, Any]:
    """{"read_gbps", "gemm_gflops"}: GB/s read by a matrix-vector product, which is what decoding does, and
    GFLOP/s of a float32 matrix product.

    Raises CalledProcessError if the process fails.
    """
    environment = {**os.environ, **dict.fromkeys(THREAD_SETTINGS, str(threads))}
    done = subprocess.run(
        [sys.executable, "-m", "edgeft.bench.machine"], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure() -> dict[str, float]:
    """Both rates with the threads that BLAS has."""
    weights, column = np.ones((READ_BYTES // 4 // WIDTH, WIDTH), np.float32), np.ones(WIDTH, np.float32)
    read_s = best_time(lambda: weights @ column)
    left, right = np.ones((SIDE, SIDE), np.float32), np.ones((SIDE, SIDE), np.float32)
    out = np.empty_like(left)
    gemm_s = best_time(lambda: np.matmul(left, right, out=out))
    return {"read_gbps": READ_BYTES / read_s / 1e9, "gemm_gflops": 2 * SIDE**3 / gemm_s / 1e9}


def best_time(
    work: Callable[[], Any], budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of the fastest of at least three runs within the budget, after one that warms up."""
    work()
    taken: list[float] = []
    end = clock() + budget_s
    while len(taken) < 3 or clock() < end:
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken)


if __name__ == "__main__":
    print(json.dumps(measure()))
