"""lm-evaluation-harness on one model: `python -m benchmarks.speed.lm_eval_side JOB`. Prints one line of JSON.

JOB: {"kind": "edgeft" or "hf", "model": folder, "threads", "tasks": {name: .jsonl file}}. A file's rows are BLiMP's
(good, bad) or questions (query, choices, gold); the tasks are made like the harness's own of the same names.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

SHAPES: dict[str, dict[str, Any]] = {
    "blimp": {"doc_to_text": "", "doc_to_target": 0, "doc_to_choice": "{{[good, bad]}}"},
    "arc_easy": {"doc_to_text": "{{query}}\nAnswer:", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}"},
}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """For each task the accuracy, and per row whether it was right."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as work:
        for name, file in job["tasks"].items():
            (Path(work) / f"{name}.yaml").write_text(yaml.safe_dump(task(name, file, Path(work))), "utf-8")
        found = simple_evaluate(
            model=model(job),
            tasks=[f"local_{name}" for name in job["tasks"]],
            task_manager=TaskManager(include_path=work, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = {name: found["samples"][f"local_{name}"] for name in job["tasks"]}
    hits = {name: [bool(s["acc"]) for s in sorted(rows, key=lambda s: s["doc_id"])] for name, rows in samples.items()}
    return {name: {"acc": sum(one) / len(one), "hits": one} for name, one in hits.items()}


def task(name: str, file: str, work: Path) -> dict[str, Any]:
    """The task's settings, in the harness's own terms."""
    return {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": file}, "cache_dir": str(work / "cache")},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **SHAPES[name],
    }


def model(job: dict[str, Any]) -> Any:
    if job["kind"] == "edgeft":
        from edgeft.bench.lm_eval_bridge import EdgeftLM

        return EdgeftLM(job["model"], threads=job["threads"])
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(job["threads"])
    return HFLM(pretrained=job["model"], dtype="float32", device="cpu", batch_size=16)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
