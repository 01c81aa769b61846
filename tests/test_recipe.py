"""Recipes: all problems at once with their lines, overrides, paths, and a schema file that is current."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeft.errors import RecipeError
from edgeft.recipe import Recipe, json_schema, load_recipe

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = """\
name: desk
base:
  model: ./model
data:
  train: rows/train.jsonl
  validation: rows/validation.jsonl
  test: hub:org/name/test
"""


def write(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "desk.yaml"
    path.write_text(text)
    return path


def test_three_mistakes_are_all_shown_with_line_and_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "train:\n  epocs: 2\n  lr: -1\nstudent:\n  layers: many\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert "3 problems" in text
    assert f"{path}:9: train.epocs: unknown setting; did you mean 'epochs'?" in text
    assert f"{path}:10: train.lr: input should be greater than 0 (found -1)" in text
    assert f"{path}:12: student.layers:" in text and "(found 'many')" in text


def test_an_unknown_section_far_from_any_other_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"zzz: unknown setting; known: base, bench, data"):
        load_recipe(write(tmp_path, MINIMAL + "zzz: 1\n"))


def test_a_missing_setting_is_named_with_the_line_of_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("  validation: rows/validation.jsonl\n", ""))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert f"{path}:4: data.validation: field required" in str(caught.value)


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: desk\nbase: {model: [\n")
    with pytest.raises(RecipeError, match=r"desk.yaml:\d+: not valid YAML"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    overrides = (
        "train.lr=1e-3",
        "student.layers=9",
        "export.gguf=[q8_0]",
        "bench.threads=null",
        "data.system=Hi there",
    )
    recipe = load_recipe(write(tmp_path), overrides)
    assert recipe.train.lr == 1e-3
    assert recipe.student and recipe.student.layers == 9
    assert recipe.export.gguf == ("q8_0",)
    assert recipe.bench.threads is None
    assert recipe.data.system == "Hi there"


def test_an_override_can_leave_the_student_out(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path), ("student=null",)).student is None


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr=[", "name.x=1"])
def test_a_bad_override_is_quoted(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path), (override,))
    assert f"--set {override!r}" in str(caught.value)


def test_a_mistake_in_an_override_is_not_blamed_on_a_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"  --set: train.epocs: unknown setting; did you mean 'epochs'"):
        load_recipe(write(tmp_path), ("train.epocs=1",))


def test_files_belong_to_the_recipe_and_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = load_recipe(write(tmp_path), ("data.train=mine.jsonl", "base.model=other.gguf"))
    assert recipe.data.train == str(here / "mine.jsonl")
    assert recipe.data.validation == str(tmp_path / "rows" / "validation.jsonl")
    assert recipe.data.test == "hub:org/name/test"
    assert recipe.base.model == str(here / "other.gguf")


def test_hub_ids_and_packaged_models_are_no_file_names(tmp_path: Path) -> None:
    for model in ("org/name", "pypi:package/file.gguf"):
        assert load_recipe(write(tmp_path, MINIMAL.replace("./model", model))).base.model == model


def test_one_threshold_can_be_set_without_losing_the_others(tmp_path: Path) -> None:
    kl = load_recipe(write(tmp_path), ("export.max_kl={q8_0: 0.5}",)).export.max_kl
    assert kl["q8_0"] == 0.5
    assert kl["f16"] == Recipe.model_fields["export"].default.max_kl["f16"]


def test_settings_cannot_be_changed_after_reading(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    with pytest.raises(ValidationError):
        recipe.name = "other"  # type: ignore[misc]


def test_the_schema_file_is_current() -> None:
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == json.loads(json.dumps(json_schema()))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_every_setting_says_what_it_means() -> None:
    schema = json_schema()
    models = [schema, *schema["$defs"].values()]
    silent = [
        f"{model['title']}.{name}"
        for model in models
        for name, field in model.get("properties", {}).items()
        if "description" not in field and "$ref" not in field and "anyOf" not in field
    ]
    assert silent == []


@given(st.text(max_size=60))
def test_no_text_makes_the_reader_crash(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.raises(RecipeError):
        path = Path(folder) / "any.yaml"
        path.write_text(text, "utf-8")
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("student: {model: ./small, layers: 9}", "a ready-made student.model is taken as it is; leave out layers"),
        ("student: {layers: 9, revision: abc}", "revision belongs to student.model, which is not set"),
        ("targets: {keep: agreeing}", "so it needs kind: answers"),
        ("targets: {kind: answers}\ndistill: {on_policy: 0.5}", "needs targets.kind: tokens"),
    ],
)
def test_settings_of_students_that_do_not_go_together_are_one_clear_problem(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL + text + "\n"))
    assert said in caught.value.message and "1 problem\n" in caught.value.message
    assert "desk.yaml:" in caught.value.message.partition("\n")[2]


def test_a_student_model_and_a_transfer_set_are_found_where_base_and_rows_are(tmp_path: Path) -> None:
    text = MINIMAL + "  transfer: rows/more.jsonl\nstudent:\n  model: ./small\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.student and recipe.student.model == str(tmp_path / "small")
    assert recipe.data.transfer == str(tmp_path / "rows" / "more.jsonl")
    for override in ("student.model=./other", "student={model: ./other}"):
        student = load_recipe(write(tmp_path), (override,)).student
        assert student and student.model == str(Path.cwd() / "other")
    student = load_recipe(write(tmp_path), ("student.model=org/name",)).student
    assert student and student.model == "org/name"
