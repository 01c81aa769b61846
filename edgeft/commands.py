"""What the commands do, without printing: recipes, runs and artifacts become lines of text."""

from __future__ import annotations

import errno
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.artifact import CHECKPOINT_DIR, MANIFEST, Artifact, open_artifact, verify
from edgeft.errors import ArtifactError, EdgeftError, RecipeError

if TYPE_CHECKING:
    from edgeft.bench.session import Messages, Session
    from edgeft.pipeline import Pipeline
    from edgeft.settings import TaskSettings
    from edgeft.tune.lr_range import Point

_EQUAL = "equal, as far as their types allow"
FULL_BELOW_BYTES = 16 * 2**20  # libraries report a full disk in their own words; so little left free is one
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


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
    from edgeft.tune.precision import choose_compute

    if not 0 < low < high or steps < 2:
        raise RecipeError(
            f"a range test from {low:g} to {high:g} in {steps} steps", "give --low below --high, and 2 steps or more"
        )
    inputs = {name: pipeline.run(name)[name] for name in ("base", "data")}
    cfg, report = pipeline.recipe.train, Reporter("lr-find", stream=pipeline.stream)
    compute = choose_compute(cfg.precision, cfg.base_is_frozen)
    lesson, _ = prepare(cfg, compute, inputs["base"].path, inputs["data"], report)
    points = range_test(lesson.trained, lesson.lengths, lesson.loss_of, cfg, low, high, steps, report)
    return points, suggestion(points)


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
