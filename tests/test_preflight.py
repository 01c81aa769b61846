"""What is refused before anything is trained, once the base model is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeft.errors import EdgeftError, ModelError, RecipeError
from edgeft.pipeline import Pipeline
from edgeft.preflight import check_student
from edgeft.recipe import load_recipe
from tests.formats.tiny_model import write_tiny_llama

RECIPE = """
name: small
base: {model: ./base}
data: {train: rows.jsonl, validation: rows.jsonl, test: rows.jsonl}
"""


def pipeline(folder: Path, *settings: str) -> Pipeline:
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "rows.jsonl").touch()
    return Pipeline(load_recipe(folder / "small.yaml", settings), folder / "runs")


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (["student.layers=9"], RecipeError, "student.layers is 9; the model it is cut from has 4"),
        (["student={decode_speedup: 2, hidden: 96}"], RecipeError, "student.hidden is 96"),
        (["student={layers: 2, vocabulary: 300}"], ModelError, "no byte-level BPE"),
    ],
)
def test_a_student_that_cannot_be_cut_is_refused_before_training(
    tmp_path: Path, settings: list[str], error: type[EdgeftError], said: str
) -> None:
    folder = write_tiny_llama(tmp_path / "base")
    if error is ModelError:
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(error, match=said):
        check_student(pipeline(tmp_path, *settings), None)
    assert [path.name.split("-")[0] for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["base"]


@pytest.mark.parametrize("to", ["data", None])
def test_what_can_be_cut_and_what_is_not_cut_is_let_through(tmp_path: Path, to: str | None) -> None:
    write_tiny_llama(tmp_path / "base")
    check_student(pipeline(tmp_path, "student={layers: 2, ffn: 64, vocabulary: 300}"), to)
    assert (tmp_path / "runs").exists() == (to is None)
