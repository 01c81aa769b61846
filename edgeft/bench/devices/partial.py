"""Logits of which only the likeliest tokens are known, as wllama tells them: the rest is filled in to be compared.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from edgeft.bench.session import Logits


def completed(reference_PV: Logits, partial_PV: Logits) -> Logits:
    """Log-probabilities [P, V] with NaN where nothing was told, filled in: what mass is left goes to these tokens in
    the reference's own proportions.

    The KL divergence from the reference is then that of the known tokens and of all others taken together: never more
    than the true one (the log sum inequality), and less only by how the rest is spread among tokens that are unlikely.
    """
    shifted = reference_PV.astype(np.float64) - reference_PV.max(axis=1, keepdims=True)
    reference = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    unknown = np.isnan(partial_PV)
    known = np.exp(np.where(unknown, -np.inf, partial_PV.astype(np.float64)))
    left = np.maximum(1 - known.sum(axis=1, keepdims=True), 1e-12)
    rest = np.where(unknown, reference, 0)
    share = rest / np.maximum(rest.sum(axis=1, keepdims=True), 1e-300)
    chances = np.maximum(np.where(unknown, left * share, known), 1e-37)
    filled: Logits = np.log(chances).astype(np.float32)
    return filled
