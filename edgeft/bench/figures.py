"""The report's pictures: from table rows, raw samples and records to charts with what stands under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from edgeft.bench.chart import Point, learning_curve, scatter
from edgeft.bench.claims import key_of
from edgeft.bench.matrix import confusion_matrix
from edgeft.bench.strips import Range, Ridge, ranges, ridges
from edgeft.bench.table import DASH, NAMES, cell

Row = dict[str, Any]
OURS = ("teacher", "student")
NO_KL = 1e-8  # nats; a smaller divergence is drawn here: a logarithmic axis has no 0
# field, factor, whether less is better, axis title, what the caption calls it
FRONTS = (
    ("bytes", 1e-6, True, "package size, MB (log scale; less is better)", "size"),
    ("decode_tps", 1, False, "decode, tokens/s (more is better)", "decode speed"),
    ("ttft_s", 1000, True, "time to first token, ms (log scale; less is better)", "latency of the first token"),
    ("peak_rss_bytes", 1e-6, True, "peak memory, MB (log scale; less is better)", "peak memory"),
)


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: a model or package beside what it was made from, over teacher-forced positions.

    `parity` holds kl_mean, kl_p99 and top1, and of a package also `general`, `steps`, `greedy` and its limit,
    `threshold` (formats/parity.py, bench/ladder.py). KL in nats.
    """

    name: str
    of: str  # what it is compared with
    parity: Mapping[str, Any]


def models_of(rows: Sequence[Row]) -> list[str]:
    """Names in the order of their colours: a name has the same colour in every report."""
    return [*NAMES, *dict.fromkeys(str(row["name"]) for row in rows if row["name"] not in NAMES)]


def fronts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Joint exact match against size, speed, latency and memory, each with its Pareto front."""
    found = []
    for name, scale, small_x, title, by in FRONTS:
        points = [_point(row, row[name] * scale, rows) for row in rows if row[name] and row["joint_exact_match"]]
        if points:
            svg = scatter(points, title, "joint exact match, %", small_x, log_x=small_x)
            found.append({"svg": Markup(svg), "by": by})
    return found


def _point(row: Row, x: float, rows: Sequence[Row]) -> Point:
    value, low, high = (100 * v for v in row["joint_exact_match"])
    title = (
        f"{key_of(row)}: {value:.1f}% ({low:.1f}-{high:.1f}), {cell(row, 'bytes', 1e-6)} MB, "
        f"{cell(row, 'decode_tps')} tokens/s, TTFT {cell(row, 'ttft_s', 1000, 0)} ms, "
        f"{cell(row, 'peak_rss_bytes', 1e-6, 0)} MB of memory"
    )
    label = row["quant"] if row["name"] in OURS else row["name"]
    return Point(x, value, low, high, label, title, _colour(row, rows), row["format"] == "onnx")


def latencies(rows: Sequence[Row], samples: Mapping[str, Sequence[Row]]) -> dict[str, Any] | None:
    """How long single tokens took, per package, from raw samples by 'name package'; None without any."""
    lines = []
    for row in rows:
        steps = [1000 * s for sample in samples.get(key_of(row), ()) for s in sample["decode_s"] if s > 0]
        if not steps:
            continue
        marks = [float(mark) for mark in np.percentile(steps, [50, 95, 99])]
        said = f"{_short(marks[0])} \N{MIDDLE DOT} {_short(marks[1])} \N{MIDDLE DOT} {_short(marks[2])}"
        lines.append(Ridge(key_of(row), said, _colour(row, rows), steps, marks))
    if not lines:
        return None
    svg = ridges(lines, "time of one token, ms (log scale)")
    return {"svg": Markup(svg), "num_steps": sum(len(line.values) for line in lines)}


def ladder(rungs: Sequence[Rung], rows: Sequence[Row]) -> dict[str, Any] | None:
    """Mean KL divergence of each rung, a bar to its 99th percentile, and the limit that it had to keep; the table."""
    if not rungs:
        return None
    names = models_of(rows)
    svg = ranges([_range(rung, names) for rung in rungs], "KL divergence, nats (log scale; less is better)", log=True)
    table = [{"name": rung.name, "of": rung.of, "cells": _ladder_cells(rung.parity)} for rung in rungs]
    return {"svg": Markup(svg), "table": table}


def _range(rung: Rung, names: Sequence[str]) -> Range:
    mean, tail = (max(float(rung.parity[key]), NO_KL) for key in ("kl_mean", "kl_p99"))
    owner = rung.name.replace(",", " ").split()[0]
    colour = names.index(owner) % 6 if owner in names else 2
    said, limit = f"{rung.parity['kl_mean']:.2g}", rung.parity.get("threshold")
    return Range(rung.name, said, colour, mean, min(mean, tail), max(mean, tail), limit, "onnx" in rung.name)


def _ladder_cells(parity: Mapping[str, Any]) -> list[str]:
    """Mean KL, 99th percentile, limit, general KL, KL of single steps, top-1, own greedy answers."""
    general, steps, greedy = (parity.get(name) or {} for name in ("general", "steps", "greedy"))
    figures = (
        parity["kl_mean"],
        parity["kl_p99"],
        parity.get("threshold"),
        general.get("kl_mean"),
        steps.get("kl_mean"),
    )
    own = f"{greedy['equal']} of {greedy['rows']}" if greedy.get("rows") else DASH
    return [*(DASH if value is None else f"{value:.2g}" for value in figures), f"{100 * parity['top1']:.2f}", own]


def slices(table: Sequence[Mapping[str, Any]], overall: Sequence[float] | None) -> Markup | None:
    """The share of right rows in each slice with its 95% interval, beside that of all rows; None without slices."""
    if not table:
        return None
    lines = []
    for entry in table:
        value, low, high = (100 * bound for bound in entry["share"])
        name = f"{entry['field']} = {entry['value']}"
        lines.append(Range(name, f"{value:.0f}% of {entry['n']}", 0, value, low, high))
    guide = 100 * overall[0] if overall else None
    return Markup(ranges(lines, "label and fields right, %", guide=guide))


def confusion(matrix: Mapping[str, Mapping[str, int]]) -> Markup | None:
    """Which labels are taken for which; None if every row's is right, or nothing was counted."""
    if not any(said != gold for gold, row in matrix.items() for said in row):
        return None
    return Markup(confusion_matrix(matrix))


def curve(stage: str, history: Mapping[str, Any]) -> dict[str, Any]:
    """The learning curve of one training stage, from its history.json."""
    window = max(1, len(history["steps"]) // 30)
    svg = learning_curve(history["steps"], history["evals"], history["best_step"], window)
    return {
        "stage": stage,
        "svg": Markup(svg),
        "window": window,
        "stopped_early": bool(history.get("stopped_early")),
        "steps": history["steps"][-1]["step"] if history["steps"] else 0,
        "best_step": history["best_step"],
    }


def _colour(row: Row, rows: Sequence[Row]) -> int:
    return models_of(rows).index(row["name"]) % 6


def _short(value: float) -> str:
    """Three digits, as tokens take from under a millisecond to seconds."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
