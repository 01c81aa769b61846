"""Every finished measurement in one SQLite file, which stays when artifacts are deleted; a table and a page of it."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape
from markupsafe import Markup

from edgeft.artifact import MANIFEST, Artifact, open_artifact
from edgeft.bench.chart import timeline
from edgeft.errors import ArtifactError

FILE = "history.sqlite"
PLOTTED = (
    ("decode_tps", 1.0, "decode, tokens/s"),
    ("joint_exact_match", 100.0, "joint exact match, %"),
    ("bytes", 1e-6, "package size, MB"),
    ("peak_rss_bytes", 1e-6, "peak RSS, MB"),
)
TABLE = """CREATE TABLE IF NOT EXISTS bench (
  artifact TEXT PRIMARY KEY, finished TEXT NOT NULL, name TEXT NOT NULL, package TEXT, cpu TEXT, threads INTEGER,
  row TEXT NOT NULL
)"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>edgeft history</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1000px; padding: 0 1rem; color: #1d1f23; }
figure { display: inline-block; width: 470px; max-width: 100%; margin: 0 0 1rem; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; } .grid { stroke: #e2e0db; } .axis { stroke: #5c6370; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.5; } .dot { fill: currentColor; }
.c0 { color: #0072b2; } .c1 { color: #c2500a; } .c2 { color: #767b85; } .c3 { color: #007a5a; } .c4 { color: #9b3f86; }
.c5 { color: #80690a; } </style></head><body><h1>History</h1>
<p>{% for name in names %}<span class="c{{ loop.index0 % 6 }}">&#9679; {{ name }}</span> {% endfor %}</p>
{% for plot in plots %}<figure>{{ plot }}</figure>{% endfor %}</body></html>
"""


@dataclass(frozen=True)
class Entry:
    """One finished measurement."""

    finished: str  # ISO 8601, UTC
    name: str  # of the node: "student-gguf-q8_0"
    package: str  # digest
    cpu: str
    threads: int
    row: dict[str, Any]


def record(runs: Path) -> int:
    """Add the finished measurements below `runs` that are not in the history yet; returns how many were added."""
    found = [open_artifact(path.parent) for path in sorted(runs.glob(f"bench-*/{MANIFEST}"))]
    if not found and not (runs / FILE).is_file():
        return 0
    with _database(runs) as db:
        before = db.total_changes
        db.executemany("INSERT OR IGNORE INTO bench VALUES (?, ?, ?, ?, ?, ?, ?)", map(_values, found))
        return db.total_changes - before


def add(runs: Path, name: str, row: dict[str, Any], host: dict[str, Any]) -> None:
    """Add one measurement that no run made, if there is a folder of runs. Raises ArtifactError if it cannot."""
    if runs.is_dir():
        now, machine = datetime.now(UTC).isoformat(), (host.get("cpu"), host.get("threads"))
        values = (f"{name} {now}", now, name, row["digest"] or "", *machine, json.dumps(row))
        with _database(runs) as db:
            db.execute("INSERT INTO bench VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def entries(runs: Path, name: str | None = None) -> list[Entry]:
    """What is recorded, oldest first; `name` keeps the measurements whose name holds it.

    Raises ArtifactError if there is nothing (of that name).
    """
    found: list[Entry] = []
    if (runs / FILE).is_file():
        with _database(runs) as db:
            rows = db.execute("SELECT finished, name, package, cpu, threads, row FROM bench ORDER BY finished, name")
            found = [
                Entry(at, who, digest, cpu, threads, json.loads(row)) for at, who, digest, cpu, threads, row in rows
            ]
    kept = [entry for entry in found if name is None or name in entry.name]
    if not kept:
        known = sorted({entry.name for entry in found})
        raise ArtifactError(
            f"{runs}: no finished measurement{f' named {name!r}' if name else ''}",
            f"known: {', '.join(known)}" if known else "`edgeft run` and `edgeft bench` make some",
        )
    return kept


def page(found: Sequence[Entry]) -> str:
    """One self-contained HTML page: each figure over the measurements, a line per name and machine."""
    series: dict[str, list[Entry]] = defaultdict(list)
    machines = {(entry.cpu, entry.threads) for entry in found}
    for entry in found:
        where = f" on {entry.cpu}, {entry.threads} threads" if len(machines) > 1 else ""
        series[entry.name + where].append(entry)
    days = sorted({entry.finished for entry in found})
    plots = []
    for field, scale, title in PLOTTED:
        lines = [[(days.index(e.finished), v * scale) for e in line if (v := _value(e.row, field)) is not None]
                 for line in series.values()]  # fmt: skip
        if any(lines):
            plots.append(Markup(timeline(lines, title, days)))
    return (
        Environment(autoescape=select_autoescape(default=True))
        .from_string(PAGE)
        .render(names=list(series), plots=plots)
    )


def _value(row: dict[str, Any], field: str) -> float | None:
    value = row.get(field)
    return value[0] if isinstance(value, list) else value


def _values(artifact: Artifact) -> tuple[Any, ...]:
    made, row = artifact.manifest.made_by, artifact.read_json("result.json")
    host = artifact.read_json("log/host.json") if "log/host.json" in artifact.manifest.files else {}
    name = str(made.get("node", artifact.path.name)).removeprefix("bench-")
    return (
        f"{artifact.manifest.key} {artifact.digest}", str(made.get("finished", "")), name, row["digest"],
        host.get("cpu"), host.get("threads"), json.dumps(row),
    )  # fmt: skip


@contextmanager
def _database(runs: Path) -> Iterator[sqlite3.Connection]:
    """The history, made if there is none; what was added is kept unless an error comes."""
    path = runs / FILE
    with closing(sqlite3.connect(path, timeout=30)) as db:
        try:
            db.execute(TABLE)
        except sqlite3.DatabaseError as error:
            raise ArtifactError(f"{path} is no SQLite file: {error}", "move it away; it is made again") from None
        try:
            with db:
                yield db
        except sqlite3.OperationalError as error:  # a full disk, or no right to write
            raise ArtifactError(f"{path}: {error}", "free space, or look at who may write there") from None
