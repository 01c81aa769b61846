"""Recipes: YAML in, frozen settings out; every problem is reported at once, with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from edgeft.errors import RecipeError
from edgeft.export_settings import ExportSettings
from edgeft.learning_settings import DistillSettings, MergeSettings, StudentSettings, TargetSettings, TrainSettings
from edgeft.settings import BaseSettings, BenchSettings, DataSettings, ReportSettings, Settings, TaskSettings


class Recipe(Settings):
    """One complete run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Name of the run: lower case, digits, - and _."""
    base: BaseSettings
    data: DataSettings
    task: TaskSettings = TaskSettings()
    train: TrainSettings = TrainSettings()
    merge: MergeSettings = MergeSettings()
    student: StudentSettings | None = StudentSettings()
    """null: no student, the teacher alone is exported and measured."""
    targets: TargetSettings = TargetSettings()
    distill: DistillSettings = DistillSettings(lr=4e-4)
    export: ExportSettings = ExportSettings()
    bench: BenchSettings = BenchSettings()
    report: ReportSettings = ReportSettings()

    @field_validator("distill")
    @classmethod
    def _scored(cls, given: DistillSettings, info: ValidationInfo) -> DistillSettings:
        targets = info.data.get("targets")
        if given.needs_teacher and targets and targets.kind == "answers":
            raise ValueError("on_policy and matching go token by token, which needs targets.kind: tokens")
        return given

    @model_validator(mode="after")
    def _lora_alone(self) -> Recipe:
        plain = self.train.method != "full" and not self.train.dora and self.train.init == "lora"
        if self.merge.adapters and not plain:
            raise ValueError("merge.adapters: only an adapter of init lora and without dora is merged with others")
        if self.export.lora and not plain:
            raise ValueError(
                "export.lora: only an adapter of method lora or qlora, init lora and without dora has a GGUF form"
            )
        return self


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe; `overrides` are 'a.b=value' with the value in YAML.

    File names in it are resolved against the recipe's folder, those in `overrides` against the
    working directory. Raises RecipeError with all problems, each with its line.
    """
    if not path.is_file():
        known = sorted(p.as_posix() for p in Path("recipes").glob("*.yaml"))
        raise RecipeError(f"{path}: no such recipe", f"known here: {', '.join(known) or 'none'}")
    text = path.read_text("utf-8")
    try:
        raw = yaml.safe_load(text)
        lines = _key_lines(yaml.compose(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}", "mend that line") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections, found {type(raw).__name__}", "see `edgeft schema`"
        )
    _resolve_files(raw, path.parent)
    for override in overrides:
        _apply_override(raw, override)
        lines[tuple(override.partition("=")[0].split("."))] = 0
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(p, path, lines) for p in error.errors()]
        raise RecipeError(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n" + "\n".join(problems),
            "`edgeft schema` prints every setting with its meaning",
        ) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, sign, value = override.partition("=")
    if not sign or not name:
        raise RecipeError(f"--set {override!r}: expected section.key=value", "for example --set train.epochs=1")
    *parents, last = name.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is no section", "see `edgeft schema`")
    try:
        section[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML", "quote it") from None
    _resolve_files(raw, Path.cwd(), only=name)


def _resolve_files(raw: dict[str, Any], folder: Path, only: str | None = None) -> None:
    """Make file names absolute. A model is a file name when it ends in .gguf or starts with . or /."""
    named = [("data", key) for key in ("train", "validation", "test", "replay", "transfer")]
    named += [("base", "model"), ("student", "model")]
    for section, key in named:
        values = raw.get(section)
        if only not in (None, section, f"{section}.{key}") or not isinstance(values, dict):
            continue
        value = values.get(key)
        if not isinstance(value, str) or value.startswith(("hub:", "pypi:")):
            continue
        if key == "model" and not (value.endswith(".gguf") or value.startswith((".", "/", "~"))):
            continue
        values[key] = str((folder / Path(value).expanduser()).resolve())
    merge = raw.get("merge")
    others = merge.get("adapters") if isinstance(merge, dict) else None
    if only in (None, "merge", "merge.adapters") and isinstance(others, list):
        for other in others:
            if isinstance(other, dict) and isinstance(other.get("adapter"), str):
                other["adapter"] = str((folder / Path(other["adapter"]).expanduser()).resolve())


def _key_lines(node: yaml.Node | None, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line (from 1) of every key, by its path."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            lines[path] = key.start_mark.line + 1
            lines |= _key_lines(value, path)
    return lines


def _explain(problem: Any, path: Path, lines: dict[tuple[str, ...], int]) -> str:
    loc = tuple(str(part) for part in problem["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = "--set" if line == 0 else f"{path}:{line}" if line else str(path)
    name = ".".join(loc)
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(loc[:-1]))
        close = difflib.get_close_matches(loc[-1], known, n=1)
        tail = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        return f"  {where}: {name}: unknown setting; {tail}"
    found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
    return f"  {where}: {name}: {problem['msg'][:1].lower()}{problem['msg'][1:]}{found}"


def _known_keys(section: tuple[str, ...]) -> Iterator[str]:
    model: type[BaseModel] = Recipe
    for part in section:
        annotation = model.model_fields[part].annotation
        options = [a for a in getattr(annotation, "__args__", (annotation,)) if isinstance(a, type)]
        model = next((a for a in options if issubclass(a, BaseModel)), Recipe)
    yield from model.model_fields


def json_schema() -> dict[str, Any]:
    """JSON Schema of recipes, for editors (`recipes/schema.json`)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
