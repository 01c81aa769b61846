from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.errors import ParityError
from edgeft.formats.probe import Probe
from edgeft.plan import ProbeNode
from edgeft.progress import Reporter
from edgeft.stages import probe
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import torch_logits, write_tiny_llama
from tests.text.tiny import write_tokenizer


def finish(folder: Path, kind: str) -> Artifact:
    write_manifest(folder, Manifest(kind, kind, "0" * 16, {}, {}, scan_files(folder)))
    return open_artifact(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("probe")
    model = write_tiny_llama(folder / "model")
    rows = folder / "data"
    rows.mkdir()
    with (rows / "validation.jsonl").open("w") as f:
        for n in range(20):
            turns = [{"role": "user", "content": f"Where is {n}?"}, {"role": "assistant", "content": f"Here, {n * 7}."}]
            f.write(json.dumps({"messages": turns, "meta": {}}) + "\n")
    return {"model": finish(model, "model"), "dataset": finish(rows, "dataset")}


def run(inputs: dict[str, Artifact], out: Path, max_kl: float | None = None) -> tuple[dict[str, Any], Probe]:
    out.mkdir()
    metrics = probe.run(ProbeNode(rows=8, max_tokens=256, max_kl=max_kl), inputs, out, Reporter("probe"))
    return metrics, Probe.load(out)


def test_rows_general_text_and_greedy_answers_are_those_of_the_model(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "GENERAL_TOKENS", 300)
    monkeypatch.setattr(probe, "GENERAL_WIDTH", 200)
    monkeypatch.setattr(probe, "GREEDY_ROWS", 3)
    monkeypatch.setattr(probe, "GREEDY_TOKENS", 5)
    metrics, found = run(inputs, tmp_path / "out")
    assert (metrics["rows"], metrics["general_rows"], metrics["general_positions"]) == (8, 2, 199 + 99)
    assert [found.where(row) for row in (0, 1, 7, 8)] == ["validation:1", "validation:3", "validation:15", "general:1"]
    model, chat = inputs["model"].path, ChatTokenizer.from_folder(inputs["model"].path)
    start = 0
    for row, at in zip(found.rows, found.positions, strict=True):
        expected = torch_logits(model, row)[at]
        np.testing.assert_allclose(found.logits_PV[start : start + len(at)], expected, atol=1e-3)
        start += len(at)
    assert len(found.greedy) == 3 and found.greedy_limit == 5
    for row, answer in enumerate(found.greedy):
        for n in range(len(answer)):
            assert torch_logits(model, found.prompt(row) + answer[:n])[-1].argmax() == answer[n]
        assert len(answer) == 5 or torch_logits(model, found.prompt(row) + answer)[-1].argmax() in chat.stop_ids


def test_a_student_is_compared_with_its_teacher(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "GENERAL_TOKENS", 100)
    monkeypatch.setattr(probe, "GREEDY_ROWS", 1)
    _, own = run(inputs, tmp_path / "teacher")
    teacher = {"parent": inputs["model"], "parent_probe": finish(tmp_path / "teacher", "probe")}
    metrics, _ = run({**inputs, **teacher}, tmp_path / "same")
    assert metrics["from_parent"]["kl_max"] < 1e-6
    (tmp_path / "other").mkdir()
    replace(own, logits_PV=np.asarray(own.logits_PV)[::-1]).save(tmp_path / "other")
    other = {**inputs, **teacher, "parent_probe": finish(tmp_path / "other", "probe")}
    metrics, _ = run(other, tmp_path / "far")
    found = metrics["from_parent"]
    assert found["kl_mean"] > 0.1 and found["general"]["n_positions"] == own.next_ids().size - found["n_positions"]
    with pytest.raises(ParityError, match=f"worst row {found['worst_row']}"):
        run(other, tmp_path / "too-far", max_kl=0.99 * found["kl_mean"])
    run(other, tmp_path / "near-enough", max_kl=1.01 * found["kl_mean"])
    fewer = finish(write_tokenizer(tmp_path / "tokenizer"), "model")
    metrics, _ = run({**inputs, **teacher, "parent": fewer}, tmp_path / "unlike")
    assert metrics["from_parent"] is None  # it has tokens that this teacher has not
