"""The files of a dataset: rows as lines of JSON, and the report on them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft.text.rows import Row

DATA_REPORT = "data_report.json"


def describe(rows: Sequence[Row], num_read: int, dropped: Counter[str]) -> dict[str, Any]:
    """Counts of one split: rows, turns by role, and length quantiles of the turns in characters."""
    turns: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {}
    for message in (m for row in rows for m in row.messages):
        turns[message["role"]] += 1
        lengths.setdefault(message["role"], []).append(len(message["content"]))
    return {
        "read": num_read,
        "kept": len(rows),
        "dropped": dict(dropped),
        "turns": dict(turns),
        "multi_turn_rows": sum(sum(m["role"] == "assistant" for m in row.messages) > 1 for row in rows),
        "characters": {role: _quantiles(sorted(values)) for role, values in lengths.items()},
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a dataset file: one {"messages", "meta"} per line."""
    write_lines(path, [as_record(row) for row in rows])


def as_record(row: Row) -> dict[str, Any]:
    """The row as a dataset file holds it."""
    return {"messages": list(row.messages), "meta": row.meta}


def write_report(folder: Path, summary: dict[str, Any]) -> None:
    """Write what was found in the rows."""
    text = json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / DATA_REPORT).write_text(text, "utf-8")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8", newline="\n") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def _quantiles(ordered: list[int]) -> dict[str, int]:
    last = len(ordered) - 1
    return {"p50": ordered[last // 2], "p95": ordered[round(last * 0.95)], "max": ordered[last]}
