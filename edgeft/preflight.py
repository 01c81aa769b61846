"""What can be known of a run before it begins: the rows and models its recipe names, looked at but not used."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import EdgeftError, RecipeError

if TYPE_CHECKING:
    from edgeft.pipeline import Pipeline
    from edgeft.recipe import Recipe


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
    from types import SimpleNamespace

    from edgeft.formats.gguf_read import read_shape
    from edgeft.formats.hf import read_config
    from edgeft.shrink.goal import goal_of
    from edgeft.stages.base import locate

    student, model = recipe.student, recipe.base.model
    on_disk = model.startswith("pypi:") or Path(model).is_absolute()
    if not student or student.model or student.decode_speedup or not on_disk:
        return []
    base = locate(recipe.base)
    goal = goal_of(student, SimpleNamespace(**(read_config(base) if base.is_dir() else read_shape(base))))
    return [f"student: {', '.join(f'{name} {size}' for name, size in asdict(goal).items())}"]
