"""`edgeft compare` and `edgeft history` over small finished measurements; no model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft import cli, measuring
from edgeft.artifact import Artifact
from edgeft.bench import run
from edgeft.bench.stats import wilson
from edgeft.bench.table import FIELDS, make_row
from tests.stages.bench_artifacts import write_artifact

Captured = pytest.CaptureFixture[str]
SPEED = {"decode_tps": 100.0, "prefill_tps": 900.0, "ttft_s": 0.1, "peak_rss_bytes": 1e8}


def package(runs: Path, name: str) -> Artifact:
    return write_artifact(runs / f"export-{name}", "package", {"model.gguf": name})


def measured(
    runs: Path, of: Artifact, hits: int, size: float, rows: int = 40, test: str = "t", threads: int = 2, **more: Any
) -> Artifact:
    found = [
        {"id": f"r{i}", "joint_correct": i < hits, "intent_correct": True, "json_valid": True, "chrf": 50.0,
         "nll": 0.1, "num_answer_tokens": 5, "slices": {"label": "x"}} for i in range(rows)
    ]  # fmt: skip
    values = {"digest": of.digest, "bytes": size, "joint_exact_match": wilson(hits, rows), **SPEED,
              "conditions": {"test_rows": test, "threads": threads}}  # fmt: skip
    files = {
        "result.json": json.dumps(make_row(values, dict.fromkeys(FIELDS, "not in this test"))),
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in found),
    }
    made = {"node": f"bench-{of.path.name}", "finished": f"2026-01-01T00:00:{hits:02d}Z"}
    artifact = write_artifact(runs / f"bench-{of.path.name}-{hits}", "report", files, made_by=made, **more)
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest |= {"inputs": {"package": of.digest}, "stage": "bench"}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    return artifact


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    old, new = package(tmp_path, "old"), package(tmp_path, "new")
    measured(tmp_path, old, 36, 2e6)
    measured(tmp_path, new, 30, 1e6)
    return tmp_path


def edgeft(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return int(stop.value.code or 0)


def compare(runs: Path, *args: str, first: str = "bench-export-old-36", second: str = "bench-export-new-30") -> int:
    return edgeft("compare", first, second, "--runs", str(runs), *args)


def gates(folder: Path, text: str) -> str:
    (folder / "gates.yaml").write_text(text)
    return str(folder / "gates.yaml")


def test_measurements_are_compared_row_by_row(runs: Path, capsys: Captured) -> None:
    assert compare(runs, "--rounds", "0", "--json") == 0
    told = {one["figure"]: one for one in json.loads(capsys.readouterr().out)["figures"]}
    assert (told["joint_exact_match"]["first"], told["joint_exact_match"]["second"]) == (0.9, 0.75)
    assert told["joint_exact_match"]["p"] == pytest.approx(2 / 2**6)
    assert told["bytes"]["change"] is None


def test_readings_of_other_circumstances_are_not_put_side_by_side(runs: Path, capsys: Captured) -> None:
    assert compare(runs, "--rounds", "0", "--json") == 0
    assert "decode_tps" in capsys.readouterr().out
    measured(runs, package(runs, "new"), 39, 1e6, threads=4)
    assert compare(runs, "--rounds", "0", "--json", second="bench-export-new-39") == 0
    said = capsys.readouterr()
    figures = {one["figure"] for one in json.loads(said.out)["figures"]}
    assert {"bytes", "joint_exact_match"} <= figures and not {"decode_tps", "peak_rss_bytes"} & figures
    assert "left out: threads 2 and 4" in said.err


def test_a_package_stands_for_its_newest_measurement(runs: Path, capsys: Captured) -> None:
    measured(runs, package(runs, "new"), 39, 1e6)
    assert compare(runs, "--rounds", "0", "--json", first="export-old", second="export-new") == 0
    assert json.loads(capsys.readouterr().out)["figures"][0]["second"] == 39 / 40


def test_a_regression_exits_with_1_and_a_kept_limit_with_0(runs: Path, tmp_path: Path, capsys: Captured) -> None:
    assert compare(runs, "--rounds", "0", "--gate", gates(tmp_path, "joint_exact_match: {max_drop: 0.1}")) == 1
    assert "NOT KEPT (found 0.15)" in capsys.readouterr().out
    assert compare(runs, "--rounds", "0", "--gate", gates(tmp_path, "joint_exact_match: {max_drop: 0.2}")) == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--gate", "nowhere.yaml", "--rounds", "0"], "nowhere.yaml: no such file"),
        (["--rounds", "2"], "2 rounds give no interval"),
    ],
)
def test_bad_input_exits_with_2(runs: Path, capsys: Captured, args: list[str], said: str) -> None:
    assert compare(runs, *args) == 2
    assert said in capsys.readouterr().err


def test_other_test_rows_are_refused(runs: Path, capsys: Captured) -> None:
    other = package(runs, "other")
    measured(runs, other, 20, 1e6, rows=20)
    measured(runs, other, 31, 1e6, test="another file")
    for second, said in (("20", "B on 20"), ("31", "different test rows")):
        assert compare(runs, "--rounds", "0", second=f"bench-export-other-{second}") == 2
        assert said in capsys.readouterr().err
    assert compare(runs, "--rounds", "0", second="nothing-here") == 2


def test_speed_is_measured_in_turns_on_the_packages(
    runs: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def time_package(folder: Path, settings: Any, strict: bool) -> dict[str, float]:
        order.append(folder.name)
        return {**SPEED, "decode_tps": 100.0 if folder.name == "export-old" else 80.0}

    monkeypatch.setattr(run, "time_package", time_package)
    file = gates(runs, "decode_tps: {min_ratio: 0.95}")
    assert compare(runs, "--rounds", "3", "--gate", file) == 1
    assert order == ["export-old", "export-new", "export-new", "export-old", "export-old", "export-new"]
    assert "0.8 × (0.8 to 0.8)" in capsys.readouterr().out


def test_packages_without_a_measurement_can_be_timed_but_not_more(tmp_path: Path, capsys: Captured) -> None:
    for name in ("a", "b"):
        package(tmp_path, name)
    assert compare(tmp_path, "--rounds", "0", first="export-a", second="export-b") == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_history_prints_what_was_measured_and_draws_it(runs: Path, capsys: Captured) -> None:
    assert edgeft("history", "--runs", str(runs)) == 0
    out = capsys.readouterr().out
    assert "export-old" in out and "75.0" in out
    assert (runs / measuring.HISTORY_PAGE).is_file()
    assert edgeft("history", "new", "--runs", str(runs)) == 0
    assert "export-old" not in capsys.readouterr().out
    assert edgeft("history", "nobody", "--runs", str(runs)) == 2
