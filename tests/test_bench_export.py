"""`make bench-export` finds the last run by its report and always ends with its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.export import run as script
from benchmarks.export.ladder import table
from benchmarks.export.last_run import LastRun, Missing
from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.errors import EdgeftError

PARITY = {"kl_mean": 0.5, "kl_p99": 1.0, "top1": 0.75}
FIGURES = {**PARITY, "general": PARITY, "format": "gguf", "quant": "q4_k_m", "bytes": 2e6, "bits_per_weight": 6.17}


def write(runs: Path, name: str, stage: str, made_at: str, **parts: Any) -> Artifact:
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "content").write_text(name)
    made_by = {"finished": made_at, "node": stage}
    given: dict[str, Any] = {"config": {}, "inputs": {}} | parts
    manifest = Manifest(stage, stage, "0" * 16, files=scan_files(folder), made_by=made_by, **given)
    write_manifest(folder, manifest)
    return open_artifact(folder)


def one_run(runs: Path, name: str, recipe: str, at: str) -> dict[str, Artifact]:
    base = write(runs, f"base-{name}", "base", at)
    data = write(runs, f"data-{name}", "data", at)
    metrics = {"validation": {"exact_match": 0.9}, "validation_as_trained": {"exact_match": 0.8}, "into": "original"}
    merge = write(runs, f"merge-{name}", "merge", at, inputs={"model": base.digest}, metrics=metrics)
    package = write(runs, f"export-{name}", "export", at, inputs={"model": merge.digest}, metrics=FIGURES)
    bench = write(runs, f"bench-{name}", "bench", at, inputs={"package": package.digest})
    shown = {"merge": merge.digest, "dataset": data.digest, "bench-teacher-gguf-q4_k_m": bench.digest}
    write(runs, f"report-{name}", "report", at, inputs=shown, config={"name": recipe})
    return {"merge": merge, "package": package}


def test_it_reads_the_newest_report_of_its_recipe(tmp_path: Path) -> None:
    one_run(tmp_path, "old", "support-bot", "2026-01-01")
    wanted = one_run(tmp_path, "new", "support-bot", "2026-01-02")
    one_run(tmp_path, "other", "my-desk", "2026-01-03")
    run = LastRun(tmp_path)
    assert run.teacher.digest == wanted["merge"].digest
    assert run.package("teacher-gguf-q4_k_m").digest == wanted["package"].digest
    found = script.figures_or_reasons(script.merge, run)
    assert (found["merge_score_adapter"], found["merge_score_merged"]) == (0.8, 0.9)
    row = "| teacher-gguf-q4_k_m | 0.5 | 1 | 75.00% | 0.5 | 2 | 6.17 | 123 | 0.0313 |"
    assert row in table(run, run.packages(), {"teacher-gguf-q4_k_m": 123.4}).splitlines()


def test_a_figure_that_cannot_be_had_is_null_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_run(tmp_path, "new", "support-bot", "2026-01-02")
    monkeypatch.setattr(script, "PEERS", tmp_path / "nowhere")
    run = LastRun(tmp_path)
    found: dict[str, Any] = {}
    for figures in (script.identity, script.perplexity, script.int4):
        found |= script.figures_or_reasons(figures, run)
    assert found["gguf_identical_tensors"] is None and "make peers" in found["gguf_identical_tensors_reason"]
    assert found["ppl_ratio_vs_llama_perplexity"] is None
    assert found["int4_kl"] is None and found["int4_kl_reason"] == "the run has no package teacher-onnx-int4"
    with pytest.raises(Missing, match="no probe"):
        run.made("probe", run.teacher)


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(EdgeftError, match="no finished run of support-bot"):
        LastRun(tmp_path)
