"""What a student learns from: targets of a model padded otherwise, answers as text, a teacher that listens."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.errors import ModelError
from edgeft.learning_settings import DistillSettings, TargetSettings
from edgeft.plan import AnswersNode
from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.stages import answers, base, distill, targets
from edgeft.text.encode import read_rows
from tests.stages.bench_artifacts import write_artifact
from tests.text.tiny import tiny_tokenizer, write_tokenizer

END = 259  # tokens of the tiny tokenizer
LOOP = DistillSettings(epochs=1, lr=1e-2, batch_rows=4, evaluations=1, precision="fp32", divergence="js")


def finished(folder: Path, kind: str = "model") -> Artifact:
    write_manifest(folder, Manifest(kind, kind, "0" * 16, {}, {}, scan_files(folder)))
    return open_artifact(folder)


def model(folder: Path, seed: int, outputs: int = END, tokenizer: Any = None) -> Path:
    """A tiny llama whose first END outputs depend on the seed alone; those behind are three times as large."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=END, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config)
    for side in (made.get_input_embeddings(), made.get_output_embeddings()):
        beyond = side.weight[: outputs - END].detach() * 3
        side.weight = nn.Parameter(torch.cat([side.weight.detach(), beyond]))
    made.config.vocab_size = outputs
    made.save_pretrained(folder)
    return write_tokenizer(folder, tokenizer=tokenizer)


def dataset(folder: Path) -> Artifact:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefg ", k=8)) for _ in range(16)]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word[::-1]}."}],
                    "meta": {"id": n}}) + "\n"
        for n, word in enumerate(words)
    ]  # fmt: skip
    return write_artifact(
        folder, "dataset", {"train.jsonl": "".join(lines[:12]), "validation.jsonl": "".join(lines[12:])}
    )


def student_of(folder: Path, source: Path, teacher: Artifact | None) -> Artifact:
    folder.mkdir()
    base.run(BaseSettings(model=str(source)), {"teacher": teacher} if teacher else {}, folder, Reporter("student"))
    return finished(folder)


def distilled(folder: Path, inputs: dict[str, Artifact], **changes: Any) -> tuple[dict[str, Any], list[float], str]:
    """Metrics, the loss of each step, and what was said."""
    folder.mkdir()
    said = io.StringIO()
    metrics = distill.run(LOOP.model_copy(update=changes), inputs, folder, Reporter("distill", folder, said))
    losses = [step["loss"] for step in json.loads((folder / "history.json").read_text())["steps"]]
    return metrics, losses, said.getvalue()


def lesson(folder: Path, teacher_outputs: int, student_outputs: int) -> dict[str, Artifact]:
    """Everything the distill stage reads."""
    folder.mkdir()
    teacher, rows = finished(model(folder / "teacher", 1, teacher_outputs)), dataset(folder / "data")
    (folder / "targets").mkdir()
    settings = TargetSettings(top_k=8, shard_rows=5, precision="fp32")
    targets.run(settings, {"model": teacher, "dataset": rows}, folder / "targets", Reporter("targets"))
    shutil.rmtree(folder / "targets" / "checkpoints")
    student = student_of(folder / "student", model(folder / "small", 2, student_outputs), teacher)
    return {"model": student, "targets": finished(folder / "targets", "targets"), "dataset": rows, "teacher": teacher}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return lesson(tmp_path_factory.mktemp("plain") / "lesson", END, END)


@pytest.fixture(scope="module")
def unpadded_losses(plain: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return distilled(tmp_path_factory.mktemp("unpadded") / "student", plain)[1]


@pytest.mark.parametrize("outputs", [(END + 29, END), (END, END + 29), (END + 29, END + 5)])
def test_padding_of_either_vocabulary_changes_no_loss(
    unpadded_losses: list[float], tmp_path: Path, outputs: tuple[int, int]
) -> None:
    _, found, _ = distilled(tmp_path / "padded", lesson(tmp_path / "lesson", *outputs))
    assert found == pytest.approx(unpadded_losses, rel=1e-5)
    assert len(found) == 3 and found[0] > 0.1
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["vocab_size"] == outputs[1]


def test_a_student_with_another_tokenizer_learns_no_probabilities(tmp_path: Path) -> None:
    raw = json.loads(tiny_tokenizer().to_str())
    raw["model"]["vocab"]["a"], raw["model"]["vocab"]["b"] = raw["model"]["vocab"]["b"], raw["model"]["vocab"]["a"]
    other = model(tmp_path / "other", 2, tokenizer=tiny_tokenizer().from_str(json.dumps(raw)))
    teacher = finished(model(tmp_path / "teacher", 1))
    with pytest.raises(ModelError, match="another tokenizer than the teacher"):
        student_of(tmp_path / "student", other, teacher)
    assert student_of(tmp_path / "alone", other, None).kind == "model"  # fit to learn answers


def test_rows_that_are_not_those_of_the_targets_are_refused(plain: dict[str, Artifact], tmp_path: Path) -> None:
    lines = plain["dataset"].file("train.jsonl").read_text().splitlines(keepends=True)
    files = {"train.jsonl": "".join(lines).replace('."', '..."', 1), "validation.jsonl": lines[0]}
    with pytest.raises(ModelError, match="cuts 1 of 12 training rows into other tokens"):
        distilled(tmp_path / "out", plain | {"dataset": write_artifact(tmp_path / "data", "dataset", files)})


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of a teacher: an answer in capitals, none to the first of a shard; returns the sizes of its shards."""
    asked: list[int] = []

    def answer_all(_: Any, __: Any, part: Sequence[list[dict[str, str]]], ___: int) -> list[Any]:
        asked.append(len(part))
        told = [[*turns[:1], {"role": "assistant", "content": turns[0]["content"].upper()[::-1]}] for turns in part]
        return ["unfinished", *told[1:]]

    monkeypatch.setattr(answers, "answer_all", answer_all)
    return asked


def answered(folder: Path, inputs: dict[str, Artifact], **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    settings = AnswersNode(own=True, keep="all", shard_rows=5, max_tokens=64, precision="fp32")
    metrics = answers.run(settings.model_copy(update=changes), inputs, folder, Reporter("answers"))
    shutil.rmtree(folder / "checkpoints")
    return metrics


def test_the_teachers_answers_stand_behind_the_labelled_rows_and_are_marked(
    plain: dict[str, Artifact], tmp_path: Path, spoken: list[int]
) -> None:
    metrics = answered(tmp_path / "out", {"model": plain["teacher"], "dataset": plain["dataset"]})
    rows, labelled = read_rows(tmp_path / "out" / "train.jsonl"), read_rows(plain["dataset"].file("train.jsonl"))
    assert spoken == [5, 5, 2] and rows[:12] == labelled and len(rows) == 21
    assert rows[12]["messages"][1]["content"] == labelled[1]["messages"][0]["content"].upper()[::-1]
    assert rows[12]["meta"] == {"id": 1, "source": "teacher"}
    assert metrics["left_out"] == {"unfinished": 3} and metrics["agreeing"] == 0
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == {"labelled": 12, "taught": 9}


def test_answers_already_given_are_not_asked_for_again(
    plain: dict[str, Artifact], tmp_path: Path, spoken: list[int]
) -> None:
    inputs = {"model": plain["teacher"], "dataset": plain["dataset"]}
    answered(tmp_path / "unbroken", inputs)
    shard = tmp_path / "out" / "checkpoints" / "answers-00001.json"
    shard.parent.mkdir(parents=True)
    shard.write_text(json.dumps(["empty"] * 5))
    metrics = answered(tmp_path / "out", inputs)
    assert metrics["resumed_shards"] == 1 and metrics["left_out"] == {"empty": 5, "unfinished": 2}
    assert spoken == [5, 5, 2, 5, 2]


def test_only_agreeing_answers_may_be_kept(plain: dict[str, Artifact], tmp_path: Path, spoken: list[int]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}], "meta": {}}
        for text, label in (("x", "X"), ("ab", "BA"), ("cd", "other"), ("ef", "FE"))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data = write_artifact(tmp_path / "data", "dataset", {"train.jsonl": lines, "validation.jsonl": lines})
    metrics = answered(tmp_path / "out", {"model": plain["teacher"], "dataset": data}, keep="agreeing")
    assert metrics["agreeing"] == metrics["kept"] == 2
    assert metrics["left_out"] == {"disagreeing": 1, "unfinished": 1}


@pytest.mark.usefixtures("spoken")
def test_a_student_learns_answers_labels_or_both(plain: dict[str, Artifact], tmp_path: Path) -> None:
    answered(tmp_path / "answers", {"model": plain["teacher"], "dataset": plain["dataset"]})
    inputs = {"model": plain["model"], "dataset": finished(tmp_path / "answers", "dataset")}
    counts = {}
    for weight in (0.0, 0.5, 1.0):
        metrics, losses, _ = distilled(tmp_path / str(weight), inputs, teacher_weight=weight, epochs=6.0)
        counts[weight] = metrics["rows"]
        assert losses[-1] < losses[0]
    assert counts == {0.0: 12, 0.5: 21, 1.0: 9}


def test_a_teacher_that_listens_is_in_memory_and_its_cost_is_said(
    plain: dict[str, Artifact], unpadded_losses: list[float], tmp_path: Path
) -> None:
    metrics, losses, said = distilled(tmp_path / "own", plain, on_policy=1.0)
    assert metrics["on_policy"]["share"] == 1.0 and metrics["on_policy"]["own_s"] > 0
    assert "4 rows take" in said and "the teacher stays in memory" in said
    assert losses != pytest.approx(unpadded_losses)
    cached = {name: artifact for name, artifact in plain.items() if name != "teacher"}
    metrics, losses, said = distilled(tmp_path / "cached", cached)
    assert "on_policy" not in metrics and "on-policy" not in said and losses == pytest.approx(unpadded_losses)
    itself = plain | {"model": plain["teacher"]}
    _, nothing, _ = distilled(tmp_path / "itself", itself, on_policy=1.0, lr=1e-9)
    assert max(map(abs, nothing)) < 1e-4


def test_what_the_student_says_itself_is_matched_inside_too(plain: dict[str, Artifact], tmp_path: Path) -> None:
    inside = {"hidden_weight": 0.1, "attention_weight": 0.1, "on_policy": 1.0, "lr": 1e-9}
    _, apart, _ = distilled(tmp_path / "out", plain, **inside)
    _, nothing, _ = distilled(tmp_path / "itself", plain | {"model": plain["teacher"]}, **inside)
    assert max(map(abs, nothing)) < 1e-3 < 0.1 < min(apart)
