"""Targets side by side: a table with targets as columns, and the same as a page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, select_autoescape

from edgeft.bench.devices.state import state_lines, without_energy
from edgeft.bench.table import COLUMNS, DASH, cell, interval, marks_of

Row = dict[str, Any]

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} on {{ rows | length }} targets</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1000px; padding: 0 1rem; color: #1d1f23; }
div { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e2e0db; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }</style></head><body><h1>{{ name }}</h1>
<p>{{ package }}</p>
{% for headers, body in tables %}<div><table><thead><tr>{% for text in headers %}<th>{{ text }}</th>{% endfor %}</tr>
</thead><tbody>{% for line in body %}<tr>{% for text in line %}<td>{{ text }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div>{% endfor %}
<ul>{% for text in remarks %}<li>{{ text }}</li>{% endfor %}</ul></body></html>
"""
FACTS = ("model", "soc", "cpu", "machine", "cores_physical", "ram_bytes", "governor", "temperature_c", "os", "build")


def target_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: figures and the devices' state as lines, targets as columns; doubtful timings with a star."""
    headers = ["", *(row["target"] + ("*" if marks_of(row) else "") for row in rows)]
    body = [["runtime", *(row["runtime"] or DASH for row in rows)]]
    body.append(["threads", *(str((row["conditions"] or {}).get("threads", DASH)) for row in rows)])
    for header, field, scale, decimals in COLUMNS:
        cells = [cell(row, field, scale, decimals) for row in rows]
        if any(text != DASH for text in cells):
            spans = [interval(row, field, scale, decimals) for row in rows]
            body.append([header, *(f"{c} ({s})" if s else c for c, s in zip(cells, spans, strict=True))])
    return headers, body + state_lines(rows)


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table leaves out: failures, doubts, and what is emulated."""
    lines = []
    for row in rows:
        conditions = row["conditions"] or {}
        if row["error"]:
            lines.append(f"{row['target']} failed: {row['error']}")
        if conditions.get("emulated"):
            lines.append(f"{row['target']} is emulated: its answers count, its timings would not")
        lines += filter(None, [without_energy(row)])
        lines += [f"* {row['target']}: {mark}" for mark in marks_of(row)]
    return lines


def page(rows: Sequence[Row]) -> str:
    """One self-contained HTML page of one package's rows: figures, then machines."""
    facts = [[field, *(_fact(row, field) for row in rows)] for field in FACTS]
    machines = [line for line in facts if any(text != DASH for text in line[1:])]
    headers = ["", *(row["target"] for row in rows)]
    package = " ".join(str(rows[0][field]) for field in ("format", "quant", "digest") if rows[0][field])
    return (
        Environment(autoescape=select_autoescape(default=True))
        .from_string(PAGE)
        .render(
            name=rows[0]["name"] or rows[0]["package"],
            package=package,
            rows=rows,
            tables=[target_table(rows), (headers, machines)],
            remarks=remarks(rows),
        )
    )


def _fact(row: Row, field: str) -> str:
    value = (row["device"] or {}).get(field)
    if field == "ram_bytes" and value is not None:
        return f"{value / 1e9:.1f} GB"
    return DASH if value is None else str(value)
