"""What the commands do, without printing: names become recipes, runs and artifacts, and these become lines of text."""

from __future__ import annotations

import errno
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edgeft.artifact import CHECKPOINT_DIR, MANIFEST, Artifact, open_artifact, verify
from edgeft.bench.runtimes import ALL, runtime_of, runtimes_of
from edgeft.errors import ArtifactError, EdgeftError, RecipeError

if TYPE_CHECKING:
    from edgeft.bench.session import Messages, Session
    from edgeft.pipeline import Pipeline
    from edgeft.recipe import Recipe, TaskSettings
    from edgeft.tune.lr_range import Point

RECIPES = Path("recipes")
PARTIAL = ".partial"
MODEL_NAMES = {"merge": "teacher", "distill": "student"}  # stages -> what the models that they make are called
_EQUAL = "equal, as far as their types allow"
FULL_BELOW_BYTES = 16 * 2**20  # libraries report a full disk in their own words; so little left free is one
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by bare name (`support-bot` is recipes/support-bot.yaml)."""
    path = Path(name)
    return path if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 else RECIPES / f"{name}.yaml"


def open_run(name: str, overrides: Sequence[str], runs: Path, stream: TextIO | None = None) -> Pipeline:
    """The pipeline of a recipe. Raises RecipeError with all of its problems."""
    from edgeft.pipeline import Pipeline
    from edgeft.recipe import load_recipe

    return Pipeline(load_recipe(find_recipe(name), tuple(overrides)), runs, stream)


def find_artifact(name: str, runs: Path) -> Artifact | None:
    """The artifact in folder `name`, or of that name below `runs`; None if `name` must be a recipe."""
    folders = [path for path in (Path(name), runs / name) if path.is_dir()]
    finished = [path for path in folders if (path / MANIFEST).is_file()]
    if folders and not finished and find_recipe(name).is_file():  # a folder that happens to be named like a recipe
        return None
    return open_artifact((finished or folders)[0]) if folders else None


def package_folders(name: str, runs: Path) -> list[Path]:
    """The folder of a package, or those of all finished packages of a recipe. Raises ArtifactError if there is none.

    A folder with a model and no manifest is one from elsewhere.
    """
    if runtimes_of(Path(name)) and not (Path(name) / MANIFEST).is_file():
        return [Path(name)]
    artifact = find_artifact(name, runs)
    if artifact:
        return [artifact.path]
    pipeline = open_run(name, (), runs)
    folders = [a.path for node in pipeline.nodes if (a := pipeline.find(node)) and a.kind == "package"]
    if not folders:
        raise ArtifactError(f"{name} has no finished package", f"make them first: edgeft run {name}")
    return folders


def to_measure(name: str, runs: Path, runtime: str | None) -> list[tuple[Path, str]]:
    """The folders of `package_folders`, each with the runtime to measure it in.

    That is the first that can run it, or `runtime`, or with "all" every one; the models that a recipe's packages were
    made from come in then too, for torch. Raises ArtifactError if there is no such folder or runtime.
    """
    folders = package_folders(name, runs)
    if runtime is None:
        return [(folder, runtime_of(folder)) for folder in folders]
    if len(folders) > 1:
        folders = [*_models_of(folders), *folders]
    found = [(folder, one) for folder in folders for one in runtimes_of(folder) if runtime in (ALL, one)]
    return found or [(folder, runtime_of(folder, runtime)) for folder in folders]  # which says what is wrong


def _models_of(packages: Sequence[Path]) -> list[Path]:
    """The model folders, beside them, that packages were exported from."""
    wanted = {open_artifact(path).manifest.inputs.get("model") for path in packages}
    beside = [open_artifact(path.parent) for path in sorted(packages[0].parent.glob(f"*-*/{MANIFEST}"))]
    return [a.path for a in beside if a.kind == "model" and a.digest in wanted]


def name_in_run(folder: Path) -> str:
    """'teacher' for a package or model that is one of a run; the folder's own name for any other."""
    if not (folder / MANIFEST).is_file():
        return folder.name
    artifact = open_artifact(folder)
    node = str(artifact.manifest.made_by.get("node") or folder.name)
    fmt, quant = (artifact.metrics.get(key) for key in ("format", "quant"))
    return MODEL_NAMES.get(node, node.removesuffix(f"-{fmt}-{quant}"))


def find_model(name: str, runs: Path) -> Path:
    """A model's file or folder, given by path or by its name below `runs`."""
    found = next((path for path in (Path(name), runs / name) if path.exists()), None)
    if found is None:
        raise ArtifactError(f"{name}: no such file or folder", "`edgeft ls` lists what there is")
    return found


def diff_rows(a: Path, b: Path) -> tuple[bool, list[list[str]]]:
    """Whether two models are equal within what their types allow, and a table of what was compared and found."""
    from edgeft.formats.diff import diff

    found = diff(a, b)
    return found.equal, [[what, line] for what, lines in found.parts().items() for line in lines or [_EQUAL]]


def answers_to_row(a: Path, b: Path, where: str) -> list[list[str]]:
    """What two models answer to the row that `where` names as FILE:NUMBER. Raises DataError if there is none."""
    from edgeft.bench.beside import answers_beside
    from edgeft.errors import DataError

    name, _, number = where.rpartition(":")
    rows = read_test_rows(Path(name)) if number.isdigit() else []
    if not number.isdigit() or not 0 < int(number) <= len(rows):
        raise DataError(f"--row {where}: no such row", "give it as FILE:NUMBER, counted from 1")
    return [list(line) for line in answers_beside([a, b], rows[int(number) - 1]["messages"])]


def result_rows(pipeline: Pipeline) -> list[dict[str, Any]]:
    """The final table, each row with the `path` of its package. Raises ArtifactError while the run is unfinished."""
    report = pipeline.find("report")
    artifacts = [a for name in pipeline.nodes if (a := pipeline.find(name))]
    if report is None:
        raise ArtifactError(
            f"{pipeline.recipe.name} is not finished: {len(artifacts)} of {len(pipeline.nodes)} stages are done",
            "`edgeft run` goes on where it stopped",
        )
    paths = {a.digest: str(a.path) for a in artifacts if a.kind == "package"}
    return [{**row, "path": paths.get(row["digest"])} for row in report.read_json("table.json")]


def plan_rows(pipeline: Pipeline, to: str | None) -> list[list[str]]:
    """What a run would do: node, state and folder of each."""
    from edgeft.pipeline import partial_of

    rows = []
    for node in pipeline.select(to):
        artifact, key = pipeline.find(node.name), pipeline.key(node)
        final = pipeline.runs / f"{node.stage}-{key}"
        if artifact:
            state, folder = "done", str(artifact.path)
        elif key is None:
            state, folder = "to do", "named when its inputs are finished"
        else:
            resumes = (partial_of(final) / CHECKPOINT_DIR).is_dir()
            state, folder = "resumes from its checkpoint" if resumes else "to do", str(final)
        rows.append([node.name, state, folder])
    return rows


def artifact_facts(artifact: Artifact) -> dict[str, Any]:
    """What stands in the manifest, with path and digest first."""
    m = artifact.manifest
    return {
        "path": str(artifact.path),
        "kind": m.kind,
        "node": m.made_by.get("node"),
        "digest": m.digest,
        "stage": m.stage,
        "key": m.key,
        "config": m.config,
        "inputs": m.inputs,
        "files": {name: {"sha256": f.sha256, "size": f.size} for name, f in m.files.items()},
        "metrics": m.metrics,
        "made_by": m.made_by,
    }


def damages(artifacts: Sequence[Artifact]) -> list[str]:
    """Every file that is missing, changed or too many, with its folder."""
    return [f"{a.path}: {problem}" for a in artifacts for problem in verify(a)]


def list_runs(runs: Path) -> list[list[str]]:
    """Finished and unfinished artifacts, newest first: folder, kind, node, size, age, digest."""
    rows = []
    for path in sorted((p for p in runs.glob("*") if p.is_dir()), key=_changed, reverse=True):
        size, age = _size(path), _age(time.time() - _changed(path))
        if not (path / MANIFEST).is_file():
            kind = "unfinished, resumes" if (path / CHECKPOINT_DIR).is_dir() else "unfinished"
            rows.append([path.name, kind, "", size, age, ""])
            continue
        try:
            artifact = open_artifact(path)
        except ArtifactError:
            rows.append([path.name, "damaged", "", size, age, ""])
            continue
        node = str(artifact.manifest.made_by.get("node", ""))
        rows.append([path.name, artifact.kind, node, size, age, artifact.digest[:12]])
    return rows


def learning_rates(pipeline: Pipeline, low: float, high: float, steps: int) -> tuple[list[Point], float]:
    """The points of a learning-rate range test with a recipe's training settings, and the rate they suggest."""
    from edgeft.progress import Reporter
    from edgeft.stages.train import prepare
    from edgeft.tune.lr_range import range_test, suggestion

    if not 0 < low < high or steps < 2:
        raise RecipeError(
            f"a range test from {low:g} to {high:g} in {steps} steps", "give --low below --high, and 2 steps or more"
        )
    inputs = {name: pipeline.run(name)[name] for name in ("base", "data")}
    cfg, report = pipeline.recipe.train, Reporter("lr-find", stream=pipeline.stream)
    lesson, _ = prepare(cfg, inputs["base"].path, inputs["data"], report)
    points = range_test(lesson.trained, lesson.lengths, lesson.loss_of, cfg, low, high, steps, report)
    return points, suggestion(points)


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
    from edgeft.recipe import BaseSettings
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


def quiet_libraries() -> None:
    """Keep warnings that no user can act on (a kernel that only a hub has, names that will change) off the screen."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def disk_errors(runs: Path) -> Iterator[None]:
    """Turn a full disk, in whatever words a library reports it, into an EdgeftError; other errors pass."""
    try:
        yield
    except EdgeftError:
        raise
    except Exception as error:
        free = shutil.disk_usage(runs if runs.exists() else Path.cwd()).free
        full = getattr(error, "errno", None) in NO_SPACE or "No space left" in str(error) or "StorageFull" in str(error)
        if full or free < FULL_BELOW_BYTES:
            raise EdgeftError(
                f"the disk of {runs} is full ({free / 1e6:,.0f} MB free): {error}",
                "free some space and run the same command again: finished stages and checkpoints are kept",
            ) from error
        raise


def system_message(package: Path) -> str | None:
    """The system message a package was trained with, found through the artifacts beside it; None if unknown."""
    if not (package / MANIFEST).is_file():
        return None
    known = {
        a.digest: a for p in package.parent.glob(f"*/{MANIFEST}") if (a := open_artifact(p.parent)).kind != "report"
    }
    todo = list(open_artifact(package).manifest.inputs.values())
    while todo:
        artifact = known.get(todo.pop())
        if artifact is None:
            continue
        if artifact.kind == "dataset":
            system: str | None = artifact.config.get("system")
            return system
        todo += artifact.manifest.inputs.values()
    return None


def answer(session: Session, messages: Messages, max_new_tokens: int, context: int) -> Iterator[str]:
    """The greedy answer to a conversation, piece by piece. Raises EdgeftError if it no longer fits the context."""
    prompt = session.prompt_ids(messages)
    if len(prompt) + max_new_tokens > context:
        raise EdgeftError(
            f"the conversation has {len(prompt)} tokens; {context} is the limit", "/reset starts a new one"
        )
    session.reset()
    logits, ids, shown = session.prefill(prompt), [], ""
    for _ in range(max_new_tokens):
        token = int(logits.argmax())
        if token in session.stop_ids:
            break
        ids.append(token)
        text = session.decode(ids)
        if not text.endswith("\ufffd"):  # half of a multi-byte character: wait for the other half
            yield text[len(shown) :]
            shown = text
        logits = session.step(token)


def read_test_rows(path: Path) -> list[dict[str, Any]]:
    """Rows to score answers on. Raises DataError with the lines that cannot be used."""
    from edgeft.text.rows import load_rows, raise_problems

    rows, problems = load_rows(str(path))
    raise_problems(problems)
    return [{"messages": list(row.messages), "meta": row.meta} for row in rows]


def grammar_from(path: Path, task: TaskSettings) -> str:
    """A grammar of the answers in a file of training rows. Raises DataError if they have no common form."""
    from edgeft.bench.grammar import grammar_of
    from edgeft.bench.task import Task

    return grammar_of(read_test_rows(path), Task(task.label, task.fields, task.escalation))


def _changed(path: Path) -> float:
    manifest = path / MANIFEST
    return (manifest if manifest.is_file() else path).stat().st_mtime


def _size(path: Path) -> str:
    return f"{sum(f.stat().st_size for f in path.rglob('*') if f.is_file()) / 1e6:,.1f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
