from __future__ import annotations

import json
from pathlib import Path

from edgeft.plan import BaselineNode
from edgeft.progress import Reporter
from edgeft.settings import TaskSettings
from edgeft.stages.baseline import run
from tests.stages.bench_artifacts import dataset


def test_the_classifier_fills_a_table_row_and_says_why_the_rest_is_absent(tmp_path: Path) -> None:
    metrics = run(BaselineNode(task=TaskSettings()), {"dataset": dataset(tmp_path / "data")}, tmp_path, Reporter("b"))
    row = json.loads((tmp_path / "result.json").read_text())
    assert row["intent_accuracy"][0] == metrics["intent_accuracy"][0] == 1.0
    assert row["intent_macro_f1"][0] == 1.0
    assert row["n"] == 6
    assert row["runtime"] == "scikit-learn"
    nulls = {name for name, value in row.items() if value is None}
    assert {"bytes", "decode_tps", "joint_exact_match", "perplexity", "digest"} <= nulls
    assert nulls - {"name"} <= set(row["absent"])


def test_its_test_rows_carry_ids_and_no_user_text(tmp_path: Path) -> None:
    run(BaselineNode(task=TaskSettings()), {"dataset": dataset(tmp_path / "data")}, tmp_path, Reporter("b"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["index"] for r in rows] == list(range(6))
    assert rows[0]["id"] == "track-kettle"
    assert "please" not in (tmp_path / "rows.jsonl").read_text()


def test_another_label_key_leaves_the_figures_out_with_its_name_in_the_reason(tmp_path: Path) -> None:
    node = BaselineNode(task=TaskSettings(label="topic"))
    run(node, {"dataset": dataset(tmp_path / "data")}, tmp_path, Reporter("b"))
    row = json.loads((tmp_path / "result.json").read_text())
    assert row["intent_accuracy"] is None
    assert "'topic'" in row["absent"]["intent_accuracy"]
