"""Tables on the terminal; in a pipe they are never cut."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def print_results(rows: list[dict[str, Any]], report: Path | None = None) -> None:
    """The result table, what makes its timings doubtful, and where packages and report lie."""
    from edgeft.bench.table import in_order, marks_of, package_label, text_table

    headers, body = text_table(rows)
    print_table(headers, body, right_from=2)
    for row in in_order(rows):
        for mark in marks_of(row):
            print(f"* {row['name']} {package_label(row)}: {mark}")
    paths = [(row["name"], row["format"], row["quant"], row["path"]) for row in in_order(rows) if row["path"]]
    if paths:
        print("\npackages")
        for name, fmt, quant, path in paths:
            print(f"  {name} {fmt} {quant}: {path}")
    if report:
        print(f"\nreport: {report / 'report.html'}")


def print_table(headers: list[str], rows: list[list[str]], right_from: int | None = None) -> None:
    """Columns from number `right_from` on are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, header in enumerate(headers):
        right = right_from is not None and number >= right_from
        table.add_column(header, justify="right" if right else "left", no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width: never cut what a script will read.
    Console(highlight=False, width=None if sys.stdout.isatty() else 400).print(table)
