"""bench: measure one package, speed and accuracy, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeft.artifact import LOG_DIR, Artifact
from edgeft.bench.grammar import grammar_of
from edgeft.bench.records import write_details, write_lines, write_result
from edgeft.bench.run import Extras, Shots, bench_package
from edgeft.bench.task import Task
from edgeft.plan import BenchNode
from edgeft.progress import Reporter
from edgeft.text.encode import read_rows


def run(cfg: BenchNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Writes result.json (a table row), rows.jsonl, details.json, log/samples.jsonl and log/host.json."""
    dataset = inputs["dataset"]
    train, task = read_rows(dataset.file("train.jsonl")), cfg.task
    held = grammar_of(train, Task(task.label, task.fields, task.escalation)) if cfg.bench.grammar else None
    shots = Shots(
        train,
        shown=cfg.few_shot,
        replaced=0 if cfg.few_shot else cfg.bench.few_shot,
    )
    measured = bench_package(
        inputs["package"].path,
        read_rows(dataset.file("test.jsonl")),
        cfg.bench,
        task,
        shots,
        report,
        extras=Extras(grammar=held),
    )
    write_result(out, measured["row"], measured["rows"])
    write_details(out, measured["details"])
    (out / LOG_DIR).mkdir(exist_ok=True)
    write_lines(out / LOG_DIR / "samples.jsonl", measured["samples"])
    (out / LOG_DIR / "host.json").write_text(json.dumps(measured["host"], indent=1) + "\n", "utf-8")
    return {key: measured["row"][key] for key in ("n", "joint_exact_match", "decode_tps", "bytes")}
