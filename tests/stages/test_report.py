from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.artifact import Artifact
from edgeft.bench.scores import calibration
from edgeft.bench.stats import wilson
from edgeft.bench.table import FIELDS, make_row
from edgeft.plan import ReportNode
from edgeft.progress import Reporter
from edgeft.stages.report import run
from tests.stages.bench_artifacts import dataset, write_artifact

HISTORY = json.dumps(
    {"steps": [{"step": 1, "loss": 2.0, "lr": 0.1}], "evals": [{"step": 1, "loss": 1.5}], "best_step": 1}
)

DETAILS = {
    "slices": [{"field": "source", "value": "phone", "n": 40, "share": wilson(20, 40)}],
    "worst_slice": {"field": "source", "value": "phone", "n": 40, "share": wilson(20, 40), "looked_at": 3,
                    "clearly_worse": True},
    "labels": [{"label": "refund", "n": 9, "predicted": 0, "precision": None, "recall": wilson(0, 9), "f1": 0.0}],
    "confusion": {"refund": {"cancel": 5, "refund": 0}},
    "calibration": calibration([0.9] * 10, [True] * 9 + [False]),
    "escalation": {"recall": wilson(3, 4)},
}  # fmt: skip
GENERAL = {"perplexity": 40.0, "bits_per_byte": 1.2}


def bench_artifact(folder: Path, hits: int, megabytes: float, load: float = 0.5, **more: Any) -> Artifact:
    values = {
        "format": "gguf", "quant": "q8_0", "digest": "ab" * 32, "bytes": int(megabytes * 1e6), "decode_tps": 9.0,
        "n": 100, "n_json": 100, "joint_exact_match": wilson(hits, 100), "package": "export-1", **more,
    }  # fmt: skip
    rows = [
        {"index": i, "joint_correct": i < hits, "intent_correct": True, "slices": {"label": "x"}} for i in range(100)
    ]
    host = {"cpu": "Test CPU", "load_average": [load, 0, 0], "absent": {}}
    files = {
        "result.json": json.dumps(make_row(values, dict.fromkeys(FIELDS, "not in this test"))),
        "rows.jsonl": "".join(json.dumps(r) + "\n" for r in rows),
        "log/host.json": json.dumps(host),
        "details.json": json.dumps(DETAILS),
    }
    return write_artifact(folder, "report", files)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    runs = tmp_path / "runs"
    svm = make_row({"n": 100, "intent_accuracy": wilson(80, 100)}, dict.fromkeys(FIELDS, "no package"))
    return {
        "train": write_artifact(runs / "train-1", "adapter", {"history.json": HISTORY}),
        "distill": write_artifact(runs / "distill-1", "model", {"history.json": HISTORY}, metrics={"general": GENERAL}),
        "merge": write_artifact(
            runs / "merge-1", "model", {}, metrics={"tensors_folded": 210, "general_base": GENERAL, "general": GENERAL}
        ),
        "dataset": dataset(runs / "data-1"),
        "bench-svm": write_artifact(
            runs / "baseline-1", "report", {"result.json": json.dumps(svm), "rows.jsonl": '{"index": 0}\n'}
        ),
        "bench-student-gguf-q8_0": bench_artifact(runs / "bench-2", 81, 60, load=1.5),
        "bench-teacher-gguf-q8_0": bench_artifact(runs / "bench-1", 90, 100),
    }


def test_the_table_names_every_row_after_its_input(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    metrics = run(ReportNode(name="demo"), inputs, tmp_path, Reporter("report"))
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table] == ["teacher", "student", "svm"]
    assert metrics["rows"] == 3
    assert all(set(FIELDS) < set(row) for row in table)


def test_claims_stand_in_the_metrics_and_on_the_page(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    metrics = run(ReportNode(name="demo"), inputs, tmp_path, Reporter("report"))
    values = {claim["what"]: claim["value"] for claim in metrics["claims"]}
    assert values["of the teacher's joint exact match is kept by the student"] == "90.0%"
    assert values["the teacher's size"] == "0.60 ×"
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "0.60 ×" in page
    assert "95% interval of the ratio" in page  # the rows of both were found


def test_the_page_shows_records_of_all_inputs(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    run(ReportNode(name="demo"), inputs, tmp_path, Reporter("report"))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "tensors_folded" in page
    assert "splits.train.kept" in page
    assert "0.5 to 1.5 over 2 packages" in page
    assert page.count('aria-label="loss') == 2
    for artifact in inputs.values():
        assert str(artifact.path) in page
        assert artifact.digest in page
    assert str(tmp_path / "runs" / "export-1") in page


def test_what_lies_under_the_figures_of_the_picked_package_is_shown(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    saved = {"saved_s": 1.25, "request_tokens": 60.0, "replaced_tokens": 900.0, "conditions": {"marks": ["busy: 40%"]}}
    inputs["bench-teacher-gguf-q8_0"] = bench_artifact(tmp_path / "runs" / "bench-3", 90, 100, **saved)
    run(ReportNode(name="demo", token_price=2.5), inputs, tmp_path, Reporter("report"))
    page = (tmp_path / "report.html").read_text("utf-8")
    for text in ("source = phone, 50.0%", "its interval lies below", "recall 75.0%",
                 "refund</td><td class=\"left\">cancel",
                 "60 tokens in place of the 900", "1.2 s and 0.0021 in money saved",
                 "teacher gguf q8_0</strong>: busy: 40%"):  # fmt: skip
        assert text in page, text


def test_a_run_without_a_student_is_reported_too(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    alone = {name: a for name, a in inputs.items() if "student" not in name and name != "distill"}
    metrics = run(ReportNode(name="demo"), alone, tmp_path, Reporter("report"))
    assert metrics["rows"] == 2
    assert (tmp_path / "report.html").read_text("utf-8").count('aria-label="loss') == 1


def test_the_same_inputs_give_the_same_bytes(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(ReportNode(name="demo"), inputs, tmp_path / name, Reporter("report"))
    for file in ("report.html", "table.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
