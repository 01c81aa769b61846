"""The report page: one self-contained HTML file made from the table, the learning curves and the records of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from edgeft.bench import figures
from edgeft.bench.claims import claims, key_of, pick
from edgeft.bench.figures import Rung, models_of
from edgeft.bench.table import (
    ACCURACY_FIELDS,
    COLUMNS,
    FIELDS,
    SPEED_FIELDS,
    cell,
    in_order,
    interval,
    marks_of,
    package_label,
)

Row = dict[str, Any]
TEMPLATE = "report.html.j2"
NUM_WEAK_LABELS = 8
GROUPS = {"speed and memory": SPEED_FIELDS, "accuracy": ACCURACY_FIELDS}

LIMITS = (
    ("Phones and other devices", "only the machine below was measured; its figures do not carry over to another CPU"),
    ("Heat", "sensors are read before and after, not while the model runs"),
    ("A phone's cold start", "cold figures have the file out of the page cache, not the disk's own cache"),
    (
        "Template, tokeniser, detokeniser",
        "left out of the timings, which go from token ids to token ids",
    ),
    ("Sampled answers", "all answers are greedy: the most likely token at every step"),
)


@dataclass(frozen=True)
class RunRecord:
    """Everything that the page shows."""

    name: str
    rows: Sequence[Row]  # the table, names set
    curves: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # stage -> history.json
    merge: Mapping[str, Any] = field(default_factory=dict)  # metrics of the merge
    general: Mapping[str, dict[str, float]] = field(default_factory=dict)  # model -> perplexity, bits_per_byte
    dataset: Mapping[str, Any] = field(default_factory=dict)  # data_report.json
    host: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Sequence[dict[str, str]] = ()  # name, kind, digest, path
    test_rows: Mapping[str, list[Row]] = field(default_factory=dict)  # 'name package' -> rows.jsonl
    details: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # 'name package' -> details.json
    samples: Mapping[str, list[Row]] = field(default_factory=dict)  # 'name package' -> raw timings
    rungs: Sequence[Rung] = ()  # from the trained adapter to the packages
    token_price: float | None = None  # of a million prompt tokens


def joint_hits(test_rows: Mapping[str, list[Row]]) -> dict[str, list[bool]]:
    """Per package, whether each row with a gold answer was all right, in row order."""
    return {
        key: [bool(row["joint_correct"]) for row in rows if row.get("joint_correct") is not None]
        for key, rows in test_rows.items()
    }


def render(run: RunRecord) -> str:
    """The page as HTML. Every text is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    rows = in_order(run.rows)
    hits = joint_hits(run.test_rows)
    picked = pick(rows, hits)
    return environment.get_template(TEMPLATE).render(
        run=run,
        claims=claims(rows, hits),
        headers=[header for header, *_ in COLUMNS],
        table=[_table_row(row, rows) for row in rows],
        num_test=max((row["n"] or 0 for row in rows), default=0),
        conditions=_conditions(rows),
        plots=figures.fronts(rows),
        models=models_of(rows),
        latency=figures.latencies(rows, run.samples),
        curves=[figures.curve(stage, history) for stage, history in run.curves.items()],
        ladder=figures.ladder(run.rungs, rows),
        weak=_weak_labels(run.test_rows.get(key_of(picked), [])) if picked else [],
        weak_package=key_of(picked) if picked else "",
        under=_under(run.details.get(key_of(picked), {}), picked["joint_exact_match"]) if picked else {},
        worst=_worst_slices(rows, run.details),
        held=_held(rows, run.details),
        doubtful=[(key_of(row), "; ".join(marks_of(row))) for row in rows if marks_of(row)],
        saved=_saved(picked, run.token_price) if picked else "",
        merge=flat(run.merge),
        warnings=list(dict(run.dataset.get("warnings") or {}).values()),
        dataset=flat({key: value for key, value in run.dataset.items() if key != "warnings"}),
        host=flat({key: value for key, value in run.host.items() if key != "absent"}),
        not_measured=_not_measured(rows, run.host),
    )


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested records as (dotted name, text) pairs."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in flat(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(text for item in value for _, text in flat(item)) or "none")]
    if isinstance(value, bool) or value is None:
        return [(name, {True: "yes", False: "no", None: "unknown"}[value])]
    if name.endswith("_bytes"):
        return [(name, f"{value / 1e6:,.0f} MB")]
    if isinstance(value, float):
        return [(name, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")]
    return [(name, f"{value:,}" if isinstance(value, int) else str(value))]


def _table_row(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    cells = [
        {
            "text": cell(row, name, scale, decimals),
            "interval": interval(row, name, scale, decimals),
            "reason": row["absent"].get(name, ""),
        }
        for _, name, scale, decimals in COLUMNS
    ]
    colour = models_of(rows).index(row["name"])
    return {"name": row["name"], "package": package_label(row), "cells": cells, "colour": colour}


def _weak_labels(test_rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The labels with the lowest joint exact match; labels without a miss are left out."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in test_rows:
        if row.get("joint_correct") is not None:
            groups[row["slices"]["label"]].append(row)
    found = [
        {
            "label": label,
            "n": len(rows),
            "joint": sum(row["joint_correct"] for row in rows),
            "intent": sum(row["intent_correct"] for row in rows),
        }
        for label, rows in groups.items()
    ]
    missed = [entry for entry in found if entry["joint"] < entry["n"]]
    return sorted(missed, key=lambda e: (e["joint"] / e["n"], -e["n"], e["label"]))[:NUM_WEAK_LABELS]


def _worst_slices(rows: Sequence[Row], details: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per package the slice with the lowest share of right rows, where there is one."""
    found = [(key_of(row), details.get(key_of(row), {}).get("worst_slice")) for row in rows]
    return [{**worst, "package": key, "share": percent(worst["share"])} for key, worst in found if worst]


def _conditions(rows: Sequence[Row]) -> dict[str, Any]:
    """What held for all packages as (name, text) pairs, and what differed as a table with a line per package."""
    measured = [(key_of(row), dict(flat(row["conditions"]))) for row in rows if row["conditions"]]
    names = list(dict.fromkeys(name for _, texts in measured for name in texts))
    differing = [name for name in names if len({texts.get(name, "") for _, texts in measured}) > 1]
    return {
        "same": [(name, measured[0][1][name]) for name in names if name not in differing],
        "headers": [name.replace("_", " ") for name in differing],
        "table": [(key, [texts.get(name, "") for name in differing]) for key, texts in measured],
    }


def _under(details: Mapping[str, Any], overall: Sequence[float]) -> dict[str, Any]:
    """What lies under the figures of one package, ready to be shown; empty if it was not measured."""
    if not details:
        return {}
    worst, sure, passed = (details.get(name) for name in ("worst_slice", "calibration", "escalation"))
    mixed = [
        (gold, said, number)
        for gold, row in details.get("confusion", {}).items()
        for said, number in row.items()
        if said != gold
    ]
    return {
        "worst": worst and {**worst, "share": percent(worst["share"])},
        "slices": [{**entry, "share": percent(entry["share"])} for entry in details["slices"]],
        "picture": figures.slices(details["slices"], overall),
        "labels": [{**entry, "recall": percent(entry["recall"])} for entry in details.get("labels", [])],
        "matrix": figures.confusion(details.get("confusion", {})),
        "mixed": sorted(mixed, key=lambda entry: (-entry[2], entry[0], entry[1]))[:NUM_WEAK_LABELS],
        "ece": sure and percent(sure["ece"]),
        "bins": sure["bins"] if sure else [],
        "num_sure": sure["n"] if sure else 0,
        "passed": passed and {key: percent(passed[key]) for key in ("precision", "recall") if key in passed},
    }


def _held(rows: Sequence[Row], details: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of each package whose answers were held to a grammar: what, rows, free, held, p."""
    return [
        (key, name.replace("_", " "), str(found["n"]), percent(side["free"]), percent(side["held"]), f"{side['p']:.2g}")
        for key in map(key_of, rows)
        for found in [details.get(key, {}).get("held_to_grammar") or {}]
        for name, side in found.items()
        if isinstance(side, Mapping)
    ]


def percent(share: Sequence[float]) -> str:
    """'90.0% (86.1-92.9)'"""
    value, low, high = (100 * bound for bound in share)
    return f"{value:.1f}% ({low:.1f}-{high:.1f})"


def _saved(row: Row, token_price: float | None) -> str:
    """What a request saves, as a sentence; '' if that was not measured."""
    if row.get("saved_s") is None:
        return ""
    tokens = row["replaced_tokens"] - row["request_tokens"]
    money = f" and {tokens * token_price / 1e6:.2g} in money" if token_price else ""
    return (
        f"A request has {row['request_tokens']:.0f} tokens in place of the {row['replaced_tokens']:.0f} of the "
        f"untrained model's prompt with examples: {row['saved_s']:.2g} s{money} saved at the measured rate, as long as "
        "the app does not keep the examples' state."
    )


def _not_measured(rows: Sequence[Row], host: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, why): absent figures by reason, unreadable host facts, and what this benchmark leaves out."""
    by_reason: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for row in rows:
        for name in FIELDS:
            if reason := row["absent"].get(name):
                by_reason[reason].setdefault(key_of(row).removesuffix(" \N{EM DASH}"), []).append(name)
    found = []
    for reason, per_row in by_reason.items():
        names = next(iter(per_row.values()))
        same = all(other == names for other in per_row.values())
        what = _field_names(names) if same else "some figures"
        found.append((f"{', '.join(per_row)}: {what}", reason))
    found += [(f"host: {name}", str(reason)) for name, reason in (host.get("absent") or {}).items()]
    return [*found, *LIMITS]


def _field_names(names: Sequence[str]) -> str:
    """Field names, whole groups by one word."""
    left, texts = list(names), []
    for title, group in GROUPS.items():
        if set(group) <= set(left):
            texts.append(title)
            left = [name for name in left if name not in group]
    return ", ".join([*texts, *left])
