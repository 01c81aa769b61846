"""The files that a measurement leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_result(out: Path, row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """result.json (one row of the table) and rows.jsonl (one line per test row)."""
    (out / "result.json").write_text(json.dumps(row, indent=1) + "\n", "utf-8")
    write_lines(out / "rows.jsonl", rows)


def write_details(out: Path, details: dict[str, Any]) -> None:
    """details.json: labels, confusion, slices, calibration, escalation."""
    (out / "details.json").write_text(json.dumps(details, indent=1) + "\n", "utf-8")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), "utf-8")
