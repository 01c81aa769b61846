"""The student stage: a first cut of the teacher, and a second one of what was healed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.artifact import Artifact
from edgeft.errors import RecipeError
from edgeft.formats.hf import load_model, read_config
from edgeft.learning_settings import StudentSettings
from edgeft.plan import StudentNode
from edgeft.progress import Reporter
from edgeft.stages import student
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import write_tiny_llama
from tests.stages.bench_artifacts import dataset, write_artifact


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    write_tiny_llama(tmp_path / "teacher")
    return {"model": write_artifact(tmp_path / "teacher", "model", {}), "dataset": dataset(tmp_path / "data")}


def run(inputs: dict[str, Artifact], out: Path, left: int = 1, **settings: Any) -> tuple[Artifact, dict[str, Any]]:
    out.mkdir()
    given = StudentSettings(**{"layers": None, **settings})
    cfg = StudentNode(student=given, max_tokens=512, precision="fp32", steps_left=left)
    metrics = student.run(cfg, inputs, out, Reporter("student", out))
    return write_artifact(out, "model", {}), metrics


def test_each_cut_is_reported_with_the_loss_it_leaves(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    made, metrics = run(inputs, tmp_path / "cut", layers=3, ffn=64, hidden=32, kv_heads=1, vocabulary=290)
    sizes = [(cut["cut"], cut["before"], cut["after"]) for cut in metrics["cuts"]]
    assert sizes == [
        ("layers", 4, 3), ("kv_heads", 2, 1), ("ffn", 96, 64), ("hidden", 64, 32), ("vocabulary", 320, 290),
    ]  # fmt: skip
    assert all(cut["loss"] > 0 for cut in metrics["cuts"]) and metrics["loss_before"] > 0
    shares = [cut["importance_removed"] for cut in metrics["cuts"]]
    assert [len(share) for share in shares] == [0, 3, 3, 1, 0]
    assert all(0 < one < 0.5 for share in shares for one in share)
    logged = [json.loads(line) for line in (made.path / "log/metrics.jsonl").open()]
    assert {line["cut"]: len(line["removed"][0]) for line in logged} == {"kv_heads": 1, "ffn": 32, "hidden": 32}
    config = read_config(made.path)
    assert (config["num_attention_heads"], config["head_dim"], config["vocab_size"]) == (2, 16, 290)
    assert sum(p.numel() for p in load_model(made.path).parameters()) == metrics["parameters"]


def test_a_vocabulary_cut_changes_no_loss_and_keeping_all_changes_nothing(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    made, metrics = run(inputs, tmp_path / "whole")
    assert metrics["cuts"] == [] and metrics["layers_kept"] == [0, 1, 2, 3]
    whole, teacher = load_model(made.path).state_dict(), load_model(inputs["model"].path).state_dict()
    assert all(torch.equal(whole[name], teacher[name]) for name in teacher)
    _, metrics = run(inputs, tmp_path / "tokens", vocabulary=290)
    assert metrics["cuts"][0]["loss"] < metrics["loss_before"]  # what the removed tokens were given is shared out


@pytest.mark.parametrize("second", [None, 275])
def test_a_second_cut_still_names_the_teachers_tokens(
    second: int | None, inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    raw, _ = run(inputs, tmp_path / "first", left=2, layers=2, vocabulary=290)
    assert read_config(raw.path)["num_hidden_layers"] == 3
    healed = run({**inputs, "model": raw}, tmp_path / "healed")[0]  # as distilling does, it writes no vocabulary.json
    assert "vocabulary.json" not in healed.manifest.files
    last, _ = run({**inputs, "model": healed, "cut": raw}, tmp_path / "last", layers=2, vocabulary=second)
    assert read_config(last.path)["num_hidden_layers"] == 2
    mapping = last.read_json("vocabulary.json")
    teacher, ours = (ChatTokenizer.from_folder(a.path).tokenizer for a in (inputs["model"], last))
    assert mapping["teacher_vocab_size"] == 320
    assert len(mapping["teacher_ids"]) == (290 if second is None else second) == ours.get_vocab_size()
    for text, token in ours.get_vocab().items():
        assert mapping["teacher_ids"][token] == teacher.token_to_id(text)


@pytest.mark.parametrize("choice", ["influence", "block"])
def test_layers_may_be_chosen_by_how_little_they_turn(choice: str, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    _, metrics = run(inputs, tmp_path / "cut", layers=2, layer_choice=choice)
    gone = [entry["layer"] for entry in metrics["layers_removed"]]
    assert len(gone) == 2 and all(0 < entry["change"] < 1 for entry in metrics["layers_removed"])
    assert sorted([*gone, *metrics["layers_kept"]]) == [0, 1, 2, 3]
    assert choice == "influence" or gone[1] == gone[0] + 1


def test_more_than_the_teacher_has_is_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"student\.ffn is 128; the model it is cut from has 96"):
        run(inputs, tmp_path / "cut", ffn=128)


def test_layers_and_ffn_may_come_from_the_clock(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    shape = write_artifact(tmp_path / "shape", "shape", {"shape.json": json.dumps({"layers": 2, "ffn": 64})})
    made, _ = run({**inputs, "shape": shape}, tmp_path / "cut", layers=4)
    config = read_config(made.path)
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 64)
