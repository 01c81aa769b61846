"""The way in which an int4 ONNX package stores its weights, chosen by what each way costs on rows of the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.bench.session import open_session
from edgeft.formats.onnx import GRAPH
from edgeft.formats.onnx_blocks import Floats, candidates, uses_bits_best
from edgeft.formats.onnx_quant import quantize_graph
from edgeft.formats.parity import differences, summarize
from edgeft.formats.probe import Probe

ROWS = 24  # of the probe


def write_best_int4(
    source: Path, out: Path, blocks: Sequence[int], importance: Mapping[str, Floats] | None, probe: Probe, threads: int
) -> list[dict[str, Any]]:
    """Write the fp32 graph `source` into the package `out`, whose other files are there, in the best of several ways.

    Tried is each block size with zero points and without. Returns what was measured of each, and which was chosen.
    """
    schemes = candidates(blocks)
    found: list[float] = []
    for scheme in schemes:
        quantize_graph(source, out / GRAPH, scheme, importance)
        found.append(_mean_kl(out, probe, threads))
    best = uses_bits_best(schemes, found)
    if best != schemes[-1]:
        quantize_graph(source, out / GRAPH, best, importance)
    return [
        {"block": s.block, "zero_points": s.zero_points, "bits": s.bits_per_weight, "kl": kl, "chosen": s == best}
        for s, kl in zip(schemes, found, strict=True)
    ]


def _mean_kl(package: Path, probe: Probe, threads: int) -> float:
    """Over some rows of the probe, evenly spaced."""
    ends = np.cumsum([len(at) for at in probe.positions])[:-1]
    references, next_ids = np.split(probe.logits_PV, ends), np.split(probe.next_ids(), ends)
    rows = range(0, probe.task_rows, max(1, probe.task_rows // ROWS))
    session = open_session(package, threads, context=max(map(len, probe.rows)))
    try:
        scored = session.score([(probe.rows[row], probe.positions[row]) for row in rows])
        parts = [differences(references[row], logits, next_ids[row]) for row, logits in zip(rows, scored, strict=True)]
    finally:
        session.close()
    return summarize(parts).kl_mean
