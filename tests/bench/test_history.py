from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edgeft.bench.history import FILE, add, entries, page, record
from edgeft.bench.stats import wilson
from edgeft.bench.table import FIELDS, make_row
from edgeft.cli_bench import _recorded
from edgeft.errors import ArtifactError
from edgeft.progress import Reporter
from tests.stages.bench_artifacts import write_artifact


def measured(runs: Path, number: int, name: str = "student-gguf-q8_0", speed: float = 100.0, cpu: str = "CPU") -> Path:
    values = {"decode_tps": speed, "bytes": 1e6, "digest": f"{number}" * 64, "joint_exact_match": wilson(9, 10)}
    files = {
        "result.json": json.dumps(make_row(values, dict.fromkeys(FIELDS, "not in this test"))),
        "rows.jsonl": "", "log/host.json": json.dumps({"cpu": cpu, "threads": 2}),
    }  # fmt: skip
    made: dict[str, Any] = {"node": f"bench-{name}", "finished": f"2026-01-{number:02d}T00:00:00Z"}
    return write_artifact(runs / f"bench-{number}", "report", files, made_by=made).path


def test_a_measurement_is_recorded_once_and_outlives_its_folder(tmp_path: Path) -> None:
    folder = measured(tmp_path, 1)
    assert (record(tmp_path), record(tmp_path)) == (1, 0)
    shutil.rmtree(folder)
    measured(tmp_path, 2, speed=120)
    assert record(tmp_path) == 1
    found = entries(tmp_path)
    assert [entry.row["decode_tps"] for entry in found] == [100, 120]
    assert (found[0].name, found[0].cpu, found[0].threads) == ("student-gguf-q8_0", "CPU", 2)


def test_what_no_run_made_is_recorded_every_time_where_there_is_a_folder_of_runs(tmp_path: Path) -> None:
    row = make_row({"decode_tps": 90.0}, dict.fromkeys(FIELDS, "not in this test"))
    for _ in range(2):
        add(tmp_path, "package-gguf-q8_0", row, {"cpu": "CPU", "threads": 1})
    add(tmp_path / "nowhere", "package-gguf-q8_0", row, {})
    assert [(e.name, e.row["decode_tps"], e.threads) for e in entries(tmp_path)] == [("package-gguf-q8_0", 90.0, 1)] * 2
    assert not (tmp_path / "nowhere").exists()


def test_a_name_selects_and_an_unknown_one_is_told_what_there_is(tmp_path: Path) -> None:
    measured(tmp_path, 1)
    measured(tmp_path, 2, name="teacher-gguf-f16")
    record(tmp_path)
    assert [entry.name for entry in entries(tmp_path, "teacher")] == ["teacher-gguf-f16"]
    with pytest.raises(ArtifactError, match="named 'nobody'") as caught:
        entries(tmp_path, "nobody")
    assert "teacher-gguf-f16" in caught.value.hint


def test_nothing_measured_makes_no_file(tmp_path: Path) -> None:
    assert record(tmp_path) == 0
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ArtifactError, match="no finished measurement"):
        entries(tmp_path)


def test_what_is_no_database_is_named(tmp_path: Path) -> None:
    measured(tmp_path, 1)
    (tmp_path / FILE).write_text("not a database, but long enough to be looked at " * 30)
    with pytest.raises(ArtifactError, match="no SQLite file"):
        record(tmp_path)


def test_the_page_draws_a_line_per_name_and_machine_without_network(tmp_path: Path) -> None:
    for number, name in enumerate(("student-gguf-q8_0", "student-gguf-q8_0", "teacher<b>"), 1):
        measured(tmp_path, number, name, 100 + number, "other CPU" if number == 2 else "CPU")
    record(tmp_path)
    text = page(entries(tmp_path))
    plots = text.split("<figure>")[1:]
    assert len(plots) == 3  # no memory was measured
    svg = ElementTree.fromstring(plots[0].partition("</figure>")[0])
    assert len(svg.findall("g")) == 3
    assert "<b>" not in text and "http" not in text
    assert "student-gguf-q8_0 on other CPU, 2 threads" in text


def test_a_broken_history_does_not_cost_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_text("not a database, but long enough to be looked at " * 30)
    row = make_row({"decode_tps": 90.0}, dict.fromkeys(FIELDS, "not in this test"))
    result = {"row": row, "host": {}, "choices": None, "details": {}, "samples": []}
    report = Reporter("bench", stream=sys.stderr)
    assert _recorded(result, tmp_path, tmp_path, report)["decode_tps"] == 90.0
    assert "not in the history" in capsys.readouterr().err
