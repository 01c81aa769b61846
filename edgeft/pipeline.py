"""The pipeline: every stage of a plan runs once per key, under a lock, and is renamed into place whole."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from filelock import FileLock, Timeout

from edgeft.artifact import (
    CHECKPOINT_DIR,
    MANIFEST,
    Artifact,
    Manifest,
    digest_of,
    file_sha256,
    open_artifact,
    scan_files,
    write_manifest,
)
from edgeft.errors import DataError, RecipeError
from edgeft.plan import Node, plan
from edgeft.processes import is_helper, wait_until
from edgeft.progress import Reporter, format_seconds
from edgeft.recipe import Recipe

StageFunction = Callable[[Any, dict[str, Artifact], Path, Reporter], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A verb of the pipeline. Bump `version` when the same config and inputs would give other output."""

    kind: str
    version: int
    module: str  # holds `run(cfg, inputs, out, report) -> metrics`, imported only when it runs
    together: bool = False  # all processes of one `accelerate launch` run it, and share each batch

    def load(self) -> StageFunction:
        function: StageFunction = import_module(self.module).run
        return function


STAGES: dict[str, Stage] = {
    "base": Stage("model", 1, "edgeft.stages.base"),
    "data": Stage("dataset", 1, "edgeft.stages.data"),
    "train": Stage("adapter", 7, "edgeft.stages.train", together=True),
    "merge": Stage("model", 4, "edgeft.stages.merge"),
    "shape": Stage("shape", 2, "edgeft.stages.shape"),
    "transfer": Stage("transfer", 1, "edgeft.stages.transfer"),
    "answers": Stage("dataset", 1, "edgeft.stages.answers"),
    "student": Stage("model", 5, "edgeft.stages.student"),
    "targets": Stage("targets", 5, "edgeft.stages.targets"),
    "distill": Stage("model", 9, "edgeft.stages.distill", together=True),
    "probe": Stage("probe", 2, "edgeft.stages.probe"),
    "export": Stage("package", 5, "edgeft.stages.export"),
    "bench": Stage("report", 5, "edgeft.stages.bench"),
    "importance": Stage("importance", 1, "edgeft.stages.importance"),
    "lora": Stage("adapter", 2, "edgeft.stages.lora"),
    "baseline": Stage("report", 2, "edgeft.stages.baseline"),
    "report": Stage("report", 3, "edgeft.stages.report"),
}
RUNTIMES = ("torch", "transformers", "peft", "bitsandbytes", "onnxruntime", "onnxruntime-genai", "llama-cpp-python")


class Pipeline:
    """The nodes of one recipe over one `runs` folder."""

    def __init__(self, recipe: Recipe, runs: Path, stream: TextIO | None = None) -> None:
        self.recipe, self.runs, self.stream = recipe, runs, stream
        self.nodes = plan(recipe)
        self._done: dict[str, Artifact] = {}

    @cached_property
    def _source_digests(self) -> dict[Path, str]:
        paths = {path for node in self.nodes.values() for path in node.sources.values()}
        return {path: _source_digest(path) for path in paths}

    def key(self, node: Node) -> str | None:
        """The node's key, or None while an input is not finished."""
        inputs: dict[str, str] = {}
        for name, source in node.inputs.items():
            artifact = self.find(source)
            if artifact is None:
                return None
            inputs[name] = artifact.digest
        config = node.config.model_dump(mode="json", exclude=set(node.sources))
        files = {name: self._source_digests[path] for name, path in node.sources.items()}
        stage = [node.stage, STAGES[node.stage].version]
        return digest_of({"stage": stage, "config": config, "files": files, "inputs": inputs})[:16]

    def find(self, name: str) -> Artifact | None:
        """The finished artifact of a node, or None."""
        if name not in self._done:
            key = self.key(self.nodes[name])
            path = self.runs / f"{self.nodes[name].stage}-{key}"
            if key is None or not (path / MANIFEST).is_file():
                return None
            self._done[name] = open_artifact(path)
        return self._done[name]

    def select(self, to: str | None) -> list[Node]:
        """The nodes needed for `to`, a node or a stage name (all of that stage); None means everything."""
        if to is None:
            return list(self.nodes.values())
        ends = [n.name for n in self.nodes.values() if to in (n.name, n.stage)]
        if not ends:
            raise RecipeError(f"--to {to}: no such stage", f"known: {', '.join(self.nodes)}")
        needed = set(ends)
        for node in reversed(self.nodes.values()):
            if node.name in needed:
                needed |= set(node.inputs.values())
        return [n for n in self.nodes.values() if n.name in needed]

    def run(self, to: str | None = None) -> dict[str, Artifact]:
        """Run what is not finished yet; returns the artifacts of all selected nodes."""
        self.runs.mkdir(parents=True, exist_ok=True)
        nodes = self.select(to)
        for number, node in enumerate(nodes, 1):
            if self.find(node.name) is None:
                self._say(f"[{number}/{len(nodes)}] {node.name}")
                self._run_node(node)
        return {node.name: self._done[node.name] for node in nodes}

    def _run_node(self, node: Node) -> None:
        key = self.key(node)
        final = self.runs / f"{node.stage}-{key}"
        if is_helper():
            self._done[node.name] = self._help(node, final)
            return
        with _locked(final.with_suffix(".lock"), self._say):
            if not (final / MANIFEST).is_file():  # another process may have finished it while this one waited
                inputs = {name: self._done[source] for name, source in node.inputs.items()}
                execute(node, str(key), inputs, final, Reporter(node.name, partial_of(final), self.stream))
        self._done[node.name] = open_artifact(final)
        seconds = self._done[node.name].manifest.made_by.get("seconds", 0.0)
        self._say(f"  {node.name}: done in {format_seconds(seconds)} -> {final}")

    def _help(self, node: Node, final: Path) -> Artifact:
        """What every process but the first does under `accelerate launch`: its share of a stage, or wait for it.

        The first process writes the artifact; if it fails, the launcher ends the others.
        """
        if STAGES[node.stage].together and not (final / MANIFEST).is_file():
            inputs = {name: self._done[source] for name, source in node.inputs.items()}
            with TemporaryDirectory(prefix="edgeft-") as folder:
                (Path(folder) / CHECKPOINT_DIR).symlink_to((partial_of(final) / CHECKPOINT_DIR).absolute())
                STAGES[node.stage].load()(node.config, inputs, Path(folder), Reporter(node.name))
        wait_until((final / MANIFEST).is_file)
        return open_artifact(final)

    def _say(self, text: str) -> None:
        if self.stream and not is_helper():
            print(text, file=self.stream, flush=True)


def partial_of(final: Path) -> Path:
    """The folder in which an artifact is made before it gets its name."""
    return final.with_name(final.name + ".partial")


def execute(node: Node, key: str, inputs: dict[str, Artifact], final: Path, report: Reporter) -> None:
    """Run one stage in `.partial`, write the manifest, rename. Checkpoints of an earlier try are kept for it."""
    partial = partial_of(final)
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.iterdir():
        if leftover.name == CHECKPOINT_DIR:
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    stage = STAGES[node.stage]
    start = time.time()
    metrics = stage.load()(node.config, inputs, partial, report)
    if (partial / CHECKPOINT_DIR).exists():
        shutil.rmtree(partial / CHECKPOINT_DIR)
    manifest = Manifest(
        kind=stage.kind,
        stage=node.stage,
        key=key,
        config=node.config.model_dump(mode="json"),
        inputs={name: artifact.digest for name, artifact in inputs.items()},
        files=scan_files(partial),
        metrics=metrics,
        made_by=_made_by(node.name, time.time() - start),
    )
    write_manifest(partial, manifest)
    if final.exists():  # a folder without manifest: it was never finished
        shutil.rmtree(final)
    os.rename(partial, final)


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"  waiting: another edgeft process is making {path.stem}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _source_digest(path: Path) -> str:
    """sha256 of a file, or of all files of a folder. Raises DataError if there is none."""
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        return digest_of({name: entry.sha256 for name, entry in scan_files(path).items()})
    raise DataError(f"{path}: no such file or folder", "correct the path in the recipe or in --set")


def _made_by(node: str, seconds: float) -> dict[str, Any]:
    versions = {}
    for package in ("edgeft", *RUNTIMES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    host = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()}
    return {
        "node": node,
        "seconds": round(seconds, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version.split()[0],
        "versions": versions,
        "host": host,
    }
