"""What can be known of a run before it begins: the rows and models its recipe names, looked at but not used."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import EdgeftError, RecipeError

if TYPE_CHECKING:
    from edgeft.learning_settings import StudentSettings
    from edgeft.pipeline import Pipeline
    from edgeft.recipe import Recipe
    from edgeft.shrink.goal import Goal


def check_inputs(pipeline: Pipeline) -> list[str]:
    """Look at the files a recipe names without running anything; returns what was found, a line each.

    Raises RecipeError with all problems.
    """
    found, problems = [], []
    for check in (_check_rows, _check_transfer, _check_models):
        try:
            found += check(pipeline.recipe)
        except EdgeftError as error:
            problems.append(error.message)
    if problems:
        raise RecipeError(
            f"{pipeline.recipe.name}: " + "\n".join(problems), "correct the recipe, or the files it names"
        )
    return found


def check_student(pipeline: Pipeline, to: str | None) -> None:
    """Before anything is trained, refuse a student that cannot be cut out of this base; makes the base model first.

    Raises RecipeError or ModelError.
    """
    student = pipeline.recipe.student
    nodes = [node for node in pipeline.select(to) if node.stage == "student"]
    if not student or student.model or all(pipeline.find(node.name) for node in nodes):
        return
    folder = pipeline.run("base")["base"].path
    _goal(student, folder)
    if student.vocabulary:
        from edgeft.shrink.vocabulary import check_tokenizer
        from edgeft.text.chat import read_json

        check_tokenizer(read_json(folder / "tokenizer.json"))


def _check_rows(recipe: Recipe) -> list[str]:
    from edgeft.stages.data import SPLITS, load_splits

    if any(getattr(recipe.data, split).startswith("hub:") for split in SPLITS):
        return ["data: rows from the hub are fetched and checked by the run"]
    return [f"data.{split}: {len(rows):,} rows" for split, rows in load_splits(recipe.data).items()]


def _check_transfer(recipe: Recipe) -> list[str]:
    from edgeft.text.rows import PROMPT_HINT, load_rows, parse_prompt, raise_problems

    if not recipe.student or not recipe.data.transfer or recipe.data.transfer.startswith("hub:"):
        return []
    rows, problems = load_rows(recipe.data.transfer, parse_prompt)
    raise_problems(problems, PROMPT_HINT)
    return [f"data.transfer: {len(rows):,} rows"]


def _check_models(recipe: Recipe) -> list[str]:
    """The base model, and the student if it is a ready-made one."""
    found = [_check_model("base", recipe.base.model, recipe.base.revision, recipe.base.sha256)]
    student = recipe.student
    if student and student.model:
        found.append(_check_model("student", student.model, student.revision, student.sha256))
    return found + _check_shape(recipe)


def _check_model(section: str, model: str, revision: str | None, sha256: str | None) -> str:
    from edgeft.artifact import file_sha256
    from edgeft.errors import ModelError
    from edgeft.settings import BaseSettings
    from edgeft.stages.base import locate

    if not model.startswith("pypi:") and not Path(model).is_absolute():
        if not revision:
            raise ModelError(f"{section}.model {model}: a hub id needs {section}.revision, the commit to fetch")
        return f"{section}.model: {model} at {revision} is fetched by the run"
    path = locate(BaseSettings(model=model, revision=revision, sha256=sha256))
    if sha256 and path.is_file() and file_sha256(path) != sha256.lower():
        raise ModelError(f"{section}.model {path}: sha256 is {file_sha256(path)}, the recipe says {sha256}")
    return f"{section}.model: {path}"


def _check_shape(recipe: Recipe) -> list[str]:
    """The shape a student is cut to: no larger than the base model's, which is the teacher's too."""
    from edgeft.stages.base import locate

    student, model = recipe.student, recipe.base.model
    on_disk = model.startswith("pypi:") or Path(model).is_absolute()
    if not student or student.model or not on_disk:
        return []
    sizes = asdict(_goal(student, locate(recipe.base)))
    if student.decode_speedup:
        sizes |= dict.fromkeys(("layers", "ffn"), "as timed")
    return [f"student: {', '.join(f'{name} {size}' for name, size in sizes.items())}"]


def _goal(student: StudentSettings, base: Path) -> Goal:
    """What the student is cut to, of a base that is a folder or a .gguf file."""
    from types import SimpleNamespace

    from edgeft.formats.gguf_read import read_shape
    from edgeft.formats.hf import read_config
    from edgeft.shrink.goal import goal_of

    config = read_config(base) if base.is_dir() else {"model_type": "llama", **read_shape(base)}
    config = {"num_key_value_heads": config.get("num_attention_heads"), **config}  # older files leave equal ones out
    asked = student.model_copy(update={"layers": None}) if student.decode_speedup else student
    return goal_of(asked, SimpleNamespace(**config))
