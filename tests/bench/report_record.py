"""Records of a made-up run, for tests of the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeft.bench.figures import Rung
from edgeft.bench.report import RunRecord
from edgeft.bench.scores import calibration
from edgeft.bench.stats import wilson
from edgeft.bench.table import FIELDS, make_row


def package(name: str, fmt: str, quant: str, hits: int, megabytes: float, tps: float) -> dict[str, Any]:
    values = {
        "name": name, "format": fmt, "quant": quant, "bytes": int(megabytes * 1e6), "decode_tps": tps, "n": 100,
        "n_json": 100, "joint_exact_match": wilson(hits, 100), "kl_mean": 0.0123, "top1": 0.97,
        "conditions": {"threads": 2, "few_shot": 0}, "package": "export-1", "digest": "ab" * 32,
    }  # fmt: skip
    return make_row(values, dict.fromkeys(FIELDS, "left out in this test"))


def svm() -> dict[str, Any]:
    values = {"name": "svm", "n": 100, "n_json": 100, "intent_accuracy": wilson(80, 100)}
    return make_row(values, dict.fromkeys(FIELDS, "a classifier is no package"))


def history() -> dict[str, Any]:
    steps = [{"step": i, "loss": 3 / i, "lr": 0.1} for i in range(1, 41)]
    return {"steps": steps, "evals": [{"step": 20, "loss": 0.2}, {"step": 40, "loss": 0.1}], "best_step": 40}


def hit_rows(hits: int) -> list[dict[str, Any]]:
    return [
        {"joint_correct": i < hits, "intent_correct": i < hits + 5, "slices": {"label": f"label-{i // 10}"}}
        for i in range(100)
    ]


def record(**more: Any) -> RunRecord:
    values: dict[str, Any] = {
        "name": "demo",
        "rows": [
            package("student", "gguf", "q8_0", 88, 87, 260),
            package("teacher", "gguf", "q8_0", 93, 145, 150),
            package("student", "onnx", "int4", 70, 60, 400),
            svm(),
        ],
        "curves": {"train": history(), "distill": history()},
        "merge": {"tensors_folded": 210, "into": "dequantized"},
        "dataset": {"splits": {"train": {"kept": 2981}}, "warnings": {"w": "3 rows differ"}},
        "host": {"cpu": "Test CPU", "threads": 2, "ram_bytes": 16e9, "absent": {"governor": "no cpufreq"}},
        "artifacts": [{"name": "train", "kind": "adapter", "digest": "cd" * 32, "path": "runs/train-1"}],
        "test_rows": {"student gguf q8_0": hit_rows(88), "teacher gguf q8_0": hit_rows(93)},
    }
    return RunRecord(**{**values, **more})


def full_record() -> RunRecord:
    """All parts of the page, with names as long as real ones and more columns than a phone is wide."""
    rows = [
        {**package(name, fmt, quant, hits, megabytes, tps), "ttft_s": 20 / tps, "peak_rss_bytes": int(3e6 * megabytes)}
        for name, fmt, quant, hits, megabytes, tps in (
            ("teacher", "gguf", "q4_k_m", 92, 105.5, 127.0),
            ("teacher", "onnx", "fp32", 93, 543.9, 51.9),
            ("student", "gguf", "q4_k_m", 88, 59.8, 227.7),
            ("student", "onnx", "int8", 89, 93.7, 196.1),
            ("base_fewshot", "gguf", "q8_0", 2, 144.8, 127.4),
        )
    ]
    chance = np.random.default_rng(0)
    samples = {
        f"{row['name']} {row['format']} {row['quant']}": [
            {"decode_s": chance.gamma(90, 1 / row["decode_tps"] / 90, 64)}
        ]
        for row in rows
    }
    parity = {"kl_mean": 0.0005, "kl_p99": 0.004, "top1": 0.99, "threshold": 0.3, "general": {"kl_mean": 0.01},
              "steps": {"kl_mean": 1e-6}, "greedy": {"rows": 16, "equal": 15}}  # fmt: skip
    slices = [
        {"field": "source", "value": value, "n": n, "share": wilson(hits, n)}
        for value, n, hits in (("phone", 40, 30), ("a rather long value of a field", 25, 22), ("web", 35, 34))
    ]
    details = {"slices": slices, "worst_slice": {**slices[0], "looked_at": 3, "clearly_worse": True}, "labels": [],
               "calibration": calibration([0.9] * 10, [True] * 9 + [False]),
               "confusion": {"cancel": {"cancel": 9, "return": 1}, "return": {"return": 10},
                             **{f"label {n}": {f"label {n}": n} for n in range(1, 11)}},
               "held_to_grammar": {"n": 50, "held_s_per_row": 0.2, "json_valid": {
                   "free": wilson(47, 50), "held": wilson(50, 50), "p": 0.25}}}  # fmt: skip
    conditions = {"threads": 2, "few_shot": 0, "others_share": 0.01, "load_average": [[0.1, 0.2, 0.3]] * 2, "marks": []}
    return record(
        rows=[{**row, "conditions": {**conditions, "repeats": i + 5}} for i, row in enumerate(rows)],
        samples=samples,
        rungs=[Rung(f"{name}", "its torch model", parity) for name in ("teacher, merged", *samples)],
        details=dict.fromkeys(samples, details),
        test_rows={"student gguf q4_k_m": hit_rows(88)},
        general={"base": {"bits_per_byte": 1.1, "perplexity": 40.0}},
    )
