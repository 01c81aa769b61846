"""Bench one package: start a worker process for it, follow its progress, put its figures into a table row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgeft.artifact import LOG_DIR, MANIFEST, open_artifact, scan_files
from edgeft.bench.fewshot import few_shot_prefix
from edgeft.bench.host import physical_cores
from edgeft.bench.like import Confinement
from edgeft.bench.session import SESSIONS
from edgeft.bench.table import ACCURACY_FIELDS, make_row
from edgeft.bench.task import Task
from edgeft.bench.worker import Spec, spec_json
from edgeft.errors import ArtifactError, EdgeftError
from edgeft.progress import Reporter
from edgeft.recipe import BenchSettings, TaskSettings

Rows = Sequence[dict[str, Any]]
STDERR_LINES = 12
NO_ROWS = "no test rows were given"
FORMATS = {"model.gguf": "gguf", "model.onnx": "onnx"}


def bench_package(
    package: Path,
    rows: Rows | None,
    settings: BenchSettings,
    task: TaskSettings,
    few_shot_rows: Rows | None = None,
    report: Reporter | None = None,
    limit: Confinement | None = None,
) -> dict[str, Any]:
    """Measure the package in folder `package` in a fresh process.

    `rows` are test rows (None: speed alone); `few_shot_rows` are training rows of which
    `settings.few_shot` stand in every prompt. The process starts under `limit`, and then maps no weights.
    Returns {"row": a table row, "rows": per test row, "samples": raw timings, "host": facts}.
    Raises ArtifactError if the folder is no package, EdgeftError if the worker fails.
    """
    facts = package_facts(package)
    prefix = few_shot_prefix(few_shot_rows or (), Task(task.label, task.fields), settings.few_shot)
    with tempfile.TemporaryDirectory(prefix="edgeft-bench-") as scratch:
        folder = Path(scratch)
        spec = Spec(
            package=str(package.resolve()),
            out=str(folder / "result.json"),
            threads=settings.threads or physical_cores(),
            prompt_tokens=settings.prompt_tokens,
            decode_tokens=settings.decode_tokens,
            repeats=settings.repeats,
            max_new_tokens=settings.max_new_tokens,
            label_key=task.label,
            fields_key=task.fields,
            rows=_write_rows(folder / "rows.jsonl", rows) if rows else None,
            prefix=tuple(prefix),
            mmap=limit is None,
        )
        measured = run_worker(spec, folder, report or Reporter("bench"), limit.prefix if limit else ())
    absent = {**facts["absent"], **measured["absent"]}
    if not rows:
        absent |= dict.fromkeys(ACCURACY_FIELDS, NO_ROWS)
    conditions = {key: getattr(spec, key) for key in ("threads", "prompt_tokens", "decode_tokens", "repeats")}
    conditions["few_shot"] = settings.few_shot if prefix else 0
    values = {**facts["values"], **measured["figures"], "package": package.name, "conditions": conditions}
    return {
        "row": make_row(values, absent),
        "rows": measured["rows"],
        "samples": measured["samples"],
        "host": measured["host"],
    }


def package_facts(package: Path) -> dict[str, Any]:
    """What is known of a package without running it: `values` for the table and the reasons of `absent` ones."""
    kind = next((FORMATS[name] for name in SESSIONS if (package / name).is_file()), None)
    if kind is None:
        raise ArtifactError(f"{package} holds none of {', '.join(SESSIONS)}", "name the folder of an exported package")
    values: dict[str, Any] = {"format": kind}
    if (package / MANIFEST).is_file():
        artifact = open_artifact(package)
        known = ("format", "quant", "bytes", "bits_per_weight", "kl_mean", "top1")
        values |= {key: artifact.metrics[key] for key in known if artifact.metrics.get(key) is not None}
        values["digest"] = artifact.digest
    if "bytes" not in values:
        sizes = {name: entry.size for name, entry in scan_files(package).items()}
        values["bytes"] = sum(size for name, size in sizes.items() if not name.startswith(LOG_DIR + "/"))
    unknown = ("quant", "digest", "bits_per_weight", "kl_mean", "top1")
    absent = {key: "the package's manifest does not say" for key in unknown if key not in values}
    return {"values": values, "absent": absent}


def run_worker(spec: Spec, folder: Path, report: Reporter, before: Sequence[str] = ()) -> dict[str, Any]:
    """Run the worker on `spec`, its command after `before`; its progress goes to `report`.

    Raises EdgeftError with its last words if it fails.
    """
    spec_path, stderr_path = folder / "spec.json", folder / "stderr.txt"
    spec_path.write_text(spec_json(spec), "utf-8")
    argv = [*before, sys.executable, "-m", "edgeft.bench.worker", str(spec_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads)}
    with (
        stderr_path.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, env=environment, encoding="utf-8") as worker,
    ):
        try:
            assert worker.stdout is not None
            _follow(worker.stdout, report)
        except BaseException:
            worker.kill()
            raise
    result: dict[str, Any] = json.loads(Path(spec.out).read_text("utf-8")) if Path(spec.out).is_file() else {}
    if "error" in result:
        raise EdgeftError(f"measuring {spec.package} failed: {result['error']['message']}", result["error"]["hint"])
    if worker.returncode != 0 or not result:
        last = stderr_path.read_text("utf-8", errors="replace").strip().splitlines()[-STDERR_LINES:]
        raise EdgeftError(
            f"measuring {spec.package} failed: its process ended with code {worker.returncode}\n"
            + "\n".join(f"  | {line}" for line in last),
            "code -9 is most often a lack of memory; otherwise export the package again",
        )
    return result


def _follow(lines: Any, report: Reporter) -> None:
    """Show the worker's progress lines; other lines (a runtime's chatter) are passed over."""
    with ExitStack() as stack:
        part, done = None, 0
        for line in lines:
            try:
                step = json.loads(line)
                what, total, now = step["what"], step["total"], step["done"]
            except (ValueError, KeyError, TypeError):
                continue
            if what != part:
                stack.close()
                task = stack.enter_context(report.track(what, total))
                part, done = what, 0
            task.advance(now - done)
            done = now


def _write_rows(path: Path, rows: Rows) -> str:
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)
