"""Two measured packages side by side: paired tests over the same test rows, and their speeds in turns.

A is the old package, B the new one; a triple is (value, low, high) with a 95% interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeft.bench.stats import Triple, bootstrap_difference, mcnemar_exact, median_ratio
from edgeft.errors import DataError

Row = dict[str, Any]
SHARES = {
    "joint_exact_match": "joint_correct",
    "intent_accuracy": "intent_correct",
    "json_valid": "json_valid",
}  # figure -> whether a row is right
SPEEDS = ("decode_tps", "prefill_tps", "ttft_s", "peak_rss_bytes")
PLAIN = ("bytes", "kl_mean", "load_s", "cold_load_s", "decode_ms_p99", "ece")
TIMED = (*SPEEDS, "load_s", "cold_load_s", "decode_ms_p99")  # of a machine, not of the file alone


@dataclass(frozen=True)
class Compared:
    """One figure of A and B; `p` and `kind` say how the difference was tested, None for a plain reading."""

    figure: str
    first: float
    second: float
    change: Triple | None  # B - A, or B / A for speeds
    kind: str  # "difference", "ratio" or "" (plain)
    p: float | None = None
    detail: str = ""


def check_same_rows(first: Sequence[Row], second: Sequence[Row]) -> None:
    """Raises DataError unless both were measured on the same rows."""
    if len(first) != len(second):
        raise DataError(
            f"A was measured on {len(first)} test rows, B on {len(second)}", "measure both on the same test set"
        )
    for number, (a, b) in enumerate(zip(first, second, strict=True), 1):
        keys = [(row["id"], row["slices"].get("label")) for row in (a, b)]
        if keys[0] != keys[1]:
            raise DataError(
                f"test row {number} is {keys[0][0]!r} (label {keys[0][1]!r}) for A, "
                f"{keys[1][0]!r} (label {keys[1][1]!r}) for B",
                "measure both on the same test set",
            )


def compare_rows(first: Sequence[Row], second: Sequence[Row]) -> list[Compared]:
    """Shares with McNemar's exact test, scores with a paired bootstrap. Raises DataError if the rows differ."""
    check_same_rows(first, second)
    pairs = list(zip(first, second, strict=True))
    found = []
    for figure, field in SHARES.items():
        judged = [(bool(a[field]), bool(b[field])) for a, b in pairs if None not in (a.get(field), b.get(field))]
        if not judged:
            continue
        lost, won = sum(a and not b for a, b in judged), sum(b and not a for a, b in judged)
        old, new = [a for a, _ in judged], [b for _, b in judged]
        detail = f"n = {len(judged)}, {lost} rows right in A alone, {won} in B alone"
        change, p = bootstrap_difference(old, new), mcnemar_exact(lost, won)
        found.append(Compared(figure, sum(old) / len(old), sum(new) / len(new), change, "difference", p, detail))
    return [*found, *_scores(pairs)]


def _scores(pairs: Sequence[tuple[Row, Row]]) -> list[Compared]:
    found = []
    for name in ("chrf", "rouge_l"):
        scored = [(a[name], b[name]) for a, b in pairs if a.get(name) is not None and b.get(name) is not None]
        if scored:
            old, new = [a for a, _ in scored], [b for _, b in scored]
            change, detail = bootstrap_difference(old, new), f"n = {len(scored)}"
            found.append(Compared(f"reply_{name}", _mean(old), _mean(new), change, "difference", None, detail))
    known = [(a, b) for a, b in pairs if a.get("nll") is not None and b.get("nll") is not None]
    tokens = [a["num_answer_tokens"] for a, _ in known]
    if known and tokens == [b["num_answer_tokens"] for _, b in known]:  # else they cut text into other tokens
        old, new = [a["nll"] for a, _ in known], [b["nll"] for _, b in known]
        value, low, high = bootstrap_difference(old, new, tokens)
        ratio = (math.exp(value), math.exp(low), math.exp(high))
        first, second = (math.exp(float(np.average(side, weights=tokens))) for side in (old, new))
        found.append(Compared("perplexity", first, second, ratio, "ratio", None, f"n = {len(known)}"))
    return found


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def alternate(measure: Callable[[str], dict[str, Any]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run A and B in turns, A B, B A, A B ...: what drifts (heat, load) meets both alike."""
    runs: dict[str, list[dict[str, Any]]] = {"A": [], "B": []}
    for number in range(rounds):
        for side in ("AB", "BA")[number % 2]:
            runs[side].append(measure(side))
    return runs


def compare_speeds(runs: dict[str, list[dict[str, Any]]]) -> list[Compared]:
    """Medians over the processes, and the ratio B / A of the medians with its interval; how many were disturbed."""
    found = []
    doubtful = sum(bool(run.get("marks")) for side in runs.values() for run in side)
    for figure in SPEEDS:
        old, new = ([run[figure] for run in runs[side]] for side in "AB")
        first, second = float(np.median(old)), float(np.median(new))
        detail = f"{len(old)} processes each, in turns" + (f", {doubtful} of them disturbed" if doubtful else "")
        found.append(Compared(figure, first, second, median_ratio(old, new), "ratio", None, detail))
    return found


def compare_plain(first: Row, second: Row, but: Sequence[str] = ()) -> list[Compared]:
    """Figures of which there is one reading each; `but` are figures that were compared better."""
    found = []
    for figure in (*PLAIN, *SPEEDS):
        a, b = first.get(figure), second.get(figure)
        if figure not in but and a is not None and b is not None:
            a, b = (value[0] if isinstance(value, list | tuple) else value for value in (a, b))
            found.append(Compared(figure, float(a), float(b), None, "", None, "one reading each"))
    return found


def as_cells(found: Compared) -> list[str]:
    """figure, A, B, change, p, what it rests on."""
    change = ""
    if found.change:
        value, low, high = found.change
        sign = "+" if found.kind == "difference" else ""
        times = "" if found.kind == "difference" else " \N{MULTIPLICATION SIGN}"
        change = f"{value:{sign}.4g}{times} ({low:{sign}.4g} to {high:{sign}.4g})"
    p = "" if found.p is None else f"{found.p:.2g}"
    return [found.figure, f"{found.first:.5g}", f"{found.second:.5g}", change, p, found.detail]
