"""What logits tell of the tokens that really follow: all that scoring a reference answer needs.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.bench.session import Logits


@dataclass(frozen=True)
class Told:
    """Nats of the tokens that follow [P], the likeliest tokens [P], and their nats [P]."""

    next_logprob: NDArray[np.float64]
    likeliest: NDArray[np.int64]
    top_logprob: NDArray[np.float64]


def told(logits_PV: Logits, next_P: NDArray[np.int64]) -> Told:
    """Log-probabilities (nats) of the tokens that follow and of the likeliest ones."""
    top_P = logits_PV.max(axis=1)
    exp_PV = np.exp(logits_PV - top_P[:, None])  # float32; the sum over the vocabulary is float64
    log_sum_P = np.log(exp_PV.sum(axis=1, dtype=np.float64)) + top_P
    next_logprob_P = logits_PV[np.arange(len(next_P)), next_P] - log_sum_P
    return Told(next_logprob_P, logits_PV.argmax(axis=1).astype(np.int64), top_P - log_sum_P)
