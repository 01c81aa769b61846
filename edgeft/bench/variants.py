"""Whether another form of an ONNX package predicts what the package predicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeft.bench.ladder import STEP_KL
from edgeft.bench.ort import open_graph
from edgeft.bench.session import Logits
from edgeft.errors import ParityError
from edgeft.formats.onnx import GRAPH
from edgeft.formats.parity import compare
from edgeft.formats.probe import Probe

ROWS = 2


def check_variant(package: Path, name: str, probe: Probe, threads: int) -> None:
    """Compare the file `name` of a package with its graph, on the shortest rows of the probe.

    Raises ParityError if the mean KL is more than single steps make of a graph.
    """
    shortest = sorted(range(probe.task_rows), key=lambda row: len(probe.rows[row]))[:ROWS]
    rows = [(probe.rows[row], probe.positions[row]) for row in shortest]
    next_ids = np.array([ids[i + 1] for ids, at in rows for i in at], np.int32)
    context = max(len(ids) for ids, _ in rows)
    expected, given = (_score(package / file, rows, threads, context) for file in (GRAPH, name))
    found = compare(expected, given, next_ids)
    if found.kl_mean > STEP_KL:
        raise ParityError(
            f"{name} predicts otherwise than {GRAPH}: mean KL {found.kl_mean:.4g} nats over {found.n_positions} "
            f"positions, at most {STEP_KL:g} expected",
            "this onnxruntime converts the graph wrongly: leave that form out of the recipe",
        )


def _score(graph: Path, rows: list[tuple[list[int], list[int]]], threads: int, context: int) -> Logits:
    session = open_graph(graph, threads, context)
    try:
        return np.concatenate(list(session.score(rows)))
    finally:
        session.close()
