"""baseline: the linear classifier that every fine-tuned model has to beat on the label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact
from edgeft.bench import svm
from edgeft.bench.records import write_result
from edgeft.bench.table import FIELDS, make_row
from edgeft.bench.task import Task
from edgeft.plan import BaselineNode
from edgeft.progress import Reporter
from edgeft.text.encode import read_rows

NO_MODEL = "a linear classifier is no package: it names the label and writes no answer"


def run(cfg: BaselineNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Writes result.json (a table row) and rows.jsonl."""
    dataset = inputs["dataset"]
    train, test = (read_rows(dataset.file(f"{split}.jsonl")) for split in ("train", "test"))
    report.note(f"fitting on {len(train)} rows")
    results, figures, absent = svm.evaluate(train, test, Task(cfg.task.label, cfg.task.fields, cfg.task.escalation))
    row = make_row({"runtime": "scikit-learn", **figures}, {**dict.fromkeys(FIELDS, NO_MODEL), **absent})
    write_result(out, row, results)
    return {key: row[key] for key in ("n", "intent_accuracy", "intent_macro_f1")}
