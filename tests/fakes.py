"""Four small stages that stand in for the real ones: the pipeline cannot tell, and they take no time.

words -> shout -> chain -> report. `chain` goes step by step with a checkpoint after each, and dies where it is told to.
`python -m tests.fakes ARGS` is `edgeft ARGS` over these stages, for tests that kill it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeft import pipeline
from edgeft.artifact import CHECKPOINT_DIR, Artifact
from edgeft.pipeline import Node, Stage
from edgeft.progress import Reporter
from edgeft.recipe import Recipe
from edgeft.settings import Settings

RECIPE = """
name: fake
base: {model: nobody/nothing, revision: abc}
data: {train: words.txt, validation: words.txt, test: words.txt}
targets: {top_k: 5}
"""
CALLS: list[str] = []  # the stages that really ran, in order


class WordsConfig(Settings):
    text: str
    system: str | None


class ShoutConfig(Settings):
    mark: str


class ChainConfig(Settings):
    steps: int


class ReportConfig(Settings):
    name: str


def _called(stage: str) -> None:
    CALLS.append(stage)
    if path := os.environ.get("FAKE_CALLS"):  # for tests that look from another process
        with Path(path).open("a") as f:
            f.write(f"{stage}\n")


def words(cfg: WordsConfig, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    _called("words")
    (out / "words.txt").write_text(Path(cfg.text).read_text())
    return {}


def shout(cfg: ShoutConfig, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    _called("shout")
    (out / "loud.txt").write_text(inputs["words"].file("words.txt").read_text().upper() + cfg.mark)
    report.metric(marks=len(cfg.mark))  # log/: differs from run to run, and must not change the digest
    return {"marks": len(cfg.mark)}


def chain(cfg: ChainConfig, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """A chain of hashes over the text: every step needs the one before."""
    _called("chain")
    checkpoint = out / CHECKPOINT_DIR / "state.json"
    state = {"step": 0, "value": inputs["loud"].file("loud.txt").read_text()}
    if checkpoint.is_file():
        state = json.loads(checkpoint.read_text())
        report.note(f"resumes at step {state['step']}")
    if (out / "scratch.txt").exists():
        raise RuntimeError("what an earlier try left behind is still here")
    (out / "scratch.txt").write_text("half-made")
    for step in range(state["step"], cfg.steps):
        if os.environ.get("FAKE_KILL_AT") == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("FAKE_FAIL_AT") == str(step):
            raise RuntimeError("this stage fails on purpose")
        time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
        state = {"step": step + 1, "value": hashlib.sha256(state["value"].encode()).hexdigest()}
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text(json.dumps(state))
    (out / "scratch.txt").unlink()
    (out / "value.txt").write_text(state["value"])
    return {"steps": cfg.steps}


def final(cfg: ReportConfig, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    from edgeft.bench.table import FIELDS, make_row

    _called("report")
    known = {"name": "student", "format": "gguf", "quant": "q8_0", "digest": inputs["chain"].digest, "bytes": 5_000_000}
    (out / "table.json").write_text(json.dumps([make_row(known, dict.fromkeys(FIELDS, "not measured"))]))
    (out / "report.html").write_text("<html></html>")
    return {}


STAGES: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "words": ("dataset", words),
    "shout": ("model", shout),
    "chain": ("package", chain),
    "report": ("report", final),
}


def plan(recipe: Recipe) -> dict[str, Node]:
    """Settings that mean something here: data.train, data.system, task.label (the mark), targets.top_k (the steps)."""
    source = Path(recipe.data.train)
    nodes = [
        Node("words", "words", WordsConfig(text=str(source), system=recipe.data.system), {}, {"text": source}),
        Node("shout", "shout", ShoutConfig(mark=recipe.task.label), {"words": "words"}),
        Node("chain", "chain", ChainConfig(steps=recipe.targets.top_k), {"loud": "shout"}),
        Node("report", "report", ReportConfig(name=recipe.name), {"chain": "chain"}),
    ]
    return {node.name: node for node in nodes}


def install(put: Callable[[Any, str, Any], None] = setattr, versions: dict[str, int] | None = None) -> None:
    """Put the stages in place of the real ones; a test passes `monkeypatch.setattr`, which undoes it."""
    table = {}
    for name, (kind, function) in STAGES.items():
        module = ModuleType(f"fake_stage_{name}")
        module.run = function  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        table[name] = Stage(kind, (versions or {}).get(name, 1), module.__name__)
    put(pipeline, "STAGES", table)
    put(pipeline, "plan", plan)


def write_recipe(folder: Path, text: str = "some words") -> Path:
    """A recipe and its one file, in `folder`."""
    (folder / "words.txt").write_text(text)
    path = folder / "fake.yaml"
    path.write_text(RECIPE)
    return path


if __name__ == "__main__":
    from edgeft.cli import main

    install()
    main()
