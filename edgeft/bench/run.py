"""Bench one package: start a worker process for it, follow its progress, put its figures into a table row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeft.artifact import LOG_DIR, MANIFEST, digest_of, open_artifact, scan_files
from edgeft.bench import machine, roofline
from edgeft.bench.choices import Question
from edgeft.bench.conditions import BUSY_SHARE, busy_now
from edgeft.bench.fewshot import few_shot_prefix
from edgeft.bench.follow import Follower
from edgeft.bench.footprint import read_footprint
from edgeft.bench.host import physical_cores
from edgeft.bench.like import Confinement
from edgeft.bench.runtimes import RUNTIMES, runtime_of
from edgeft.bench.table import ACCURACY_FIELDS, SAVED_FIELDS, make_row
from edgeft.bench.task import Task
from edgeft.bench.worker import Spec, spec_json
from edgeft.errors import EdgeftError
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings, TaskSettings

Rows = Sequence[dict[str, Any]]
STDERR_LINES = 12
PARTS = ("rows", "details", "choices", "samples", "host")  # of what the worker gives
NO_ROWS = "no test rows were given"
NO_PACKAGE = "a model folder, computed in float32: what packages are compared with"


@dataclass(frozen=True)
class Shots:
    """Training rows, and how many of them stand in every prompt (`shown`), or would have to if the model were an
    untrained one (`replaced`: such prompts are only counted)."""

    rows: Rows
    shown: int = 0
    replaced: int = 0


@dataclass(frozen=True)
class Extras:
    """Multiple choice, and a grammar (GBNF) that some answers are held to, beside the free ones."""

    questions: Sequence[Question] = ()
    grammar: str | None = None


def bench_package(
    package: Path,
    rows: Rows | None,
    settings: BenchSettings,
    task: TaskSettings,
    shots: Shots | None = None,
    report: Reporter | None = None,
    limit: Confinement | None = None,
    strict: bool = False,
    extras: Extras | None = None,
    runtime: str | None = None,
) -> dict[str, Any]:
    """Measure the package in folder `package` in a fresh process.

    `rows` are test rows (None: speed alone), `extras` what else is asked; `runtime` is a name of `RUNTIMES`, None takes
    the first that can run the package. The process starts under `limit`, and then
    maps no weights and has no cold start. Returns {"row": a table row, "rows": per test row, "details": what lies under
    the figures, "choices": what multiple choice found, or None, "samples": raw timings, "host": facts}.
    Raises ArtifactError if the folder is no package, EdgeftError if the worker fails, or, with `strict`, if the machine
    was not quiet and steady.
    """
    report = report or Reporter("bench")
    threads = settings.threads or physical_cores()
    if strict:
        refuse_busy(threads)
    facts = package_facts(package, runtime)
    ceiling = roofline.ceiling(read_footprint(package), machine.probe(threads), settings.prompt_tokens)
    report.note(ceiling.text())
    parsed = Task(task.label, task.fields, task.escalation)
    prefix = few_shot_prefix(shots.rows, parsed, shots.shown) if shots else []
    with tempfile.TemporaryDirectory(prefix="edgeft-bench-") as scratch:
        folder = Path(scratch)
        spec = replace(
            _spec(package, folder, settings, task),
            grammar=extras.grammar if extras else None,
            choices=tuple((q.query, q.choices, q.gold) for q in extras.questions) if extras else (),
            rows=_write_rows(folder / "rows.jsonl", rows) if rows else None,
            prefix=tuple(prefix),
            replaced=tuple(few_shot_prefix(shots.rows, parsed, shots.replaced)) if shots else (),
            mmap=limit is None,
            cold=limit is None,
            runtime=runtime,
        )
        measured = run_worker(spec, folder, report, limit.prefix if limit else ())
    report.note(ceiling.reached(measured["figures"]))
    _tell(package, measured["conditions"]["marks"], strict, report)
    measured["figures"] |= ceiling.shares(measured["figures"])
    measured["conditions"] = {
        **{key: getattr(spec, key) for key in ("threads", "prompt_tokens", "decode_tokens")},
        "few_shot": shots.shown if shots and prefix else 0,
        **measured["conditions"],
        "read_gbps": ceiling.read_gbps,
        "gemm_gflops": ceiling.gemm_gflops,
    }
    return as_result(package, facts, measured, rows)


def as_result(package: Path, facts: dict[str, Any], measured: dict[str, Any], rows: Rows | None) -> dict[str, Any]:
    """What `bench_package` returns, from `package_facts` and from what was measured, wherever that was."""
    figures = measured["figures"]
    absent = {**facts["absent"], **measured["absent"], **_saved(figures)}
    if not rows:
        absent |= dict.fromkeys((*ACCURACY_FIELDS, *SAVED_FIELDS), NO_ROWS)
    conditions = measured["conditions"]
    conditions |= {key: figures.pop(key) for key in ("repeats", "warm_ups", "spread") if key in figures}
    if rows:
        conditions["test_rows"] = digest_of(rows)
    values = {**facts["values"], **figures, "package": package.name, "conditions": conditions}
    return {"row": make_row(values, absent), **{part: measured[part] for part in PARTS}}


def _tell(package: Path, marks: Sequence[str], strict: bool, report: Reporter) -> None:
    """Say what makes the timings doubtful. Raises EdgeftError if that is to be refused."""
    if strict and marks:
        raise EdgeftError(f"{package}: the timings are doubtful: {'; '.join(marks)}", "measure on a quiet machine")
    for mark in marks:
        report.note(f"doubtful timings: {mark}")


def time_package(
    package: Path, settings: BenchSettings, strict: bool = False, runtime: str | None = None
) -> dict[str, Any]:
    """Speed and memory alone, of one fresh process, with `settings.repeats` repeats; "marks" say what makes them
    doubtful. Raises like `bench_package`."""
    if strict:
        refuse_busy(settings.threads or physical_cores())
    with tempfile.TemporaryDirectory(prefix="edgeft-bench-") as scratch:
        spec = _spec(package, Path(scratch), settings, TaskSettings())
        spec = replace(spec, seconds=0.0, cold=False, runtime=runtime)
        measured = run_worker(spec, Path(scratch), Reporter("bench"))
    marks = measured["conditions"]["marks"]
    if strict:
        _tell(package, marks, strict, Reporter("bench"))
    return {**measured["figures"], "marks": marks}


def _spec(package: Path, folder: Path, settings: BenchSettings, task: TaskSettings) -> Spec:
    return Spec(
        package=str(package.resolve()),
        out=str(folder / "result.json"),
        threads=settings.threads or physical_cores(),
        prompt_tokens=settings.prompt_tokens,
        decode_tokens=settings.decode_tokens,
        repeats=settings.repeats,
        max_new_tokens=settings.max_new_tokens,
        label_key=task.label,
        fields_key=task.fields,
        escalation=task.escalation,
        seconds=settings.seconds,
        precision=settings.precision,
    )


def refuse_busy(threads: int) -> None:
    """Raises EdgeftError if others are using the machine right now."""
    share = busy_now(threads)
    if share > BUSY_SHARE:
        raise EdgeftError(
            f"others take {share:.0%} of the time of {threads} threads right now; --strict allows {BUSY_SHARE:.0%}",
            "end other work, or measure without --strict: the result is then marked",
        )


def _saved(figures: dict[str, Any]) -> dict[str, str]:
    """Adds the seconds a request saves against the examples that an untrained model would need; returns what is absent.

    The time is the prompt's, at the measured prefill rate; an app that keeps the examples' state saves less.
    """
    if figures.get("replaced_tokens") is None:
        return dict.fromkeys(SAVED_FIELDS, "this prompt replaces no examples")
    figures["saved_s"] = (figures["replaced_tokens"] - figures["request_tokens"]) / figures["prefill_tps"]
    return {}


def package_facts(package: Path, runtime: str | None = None) -> dict[str, Any]:
    """What is known of a package without running it: `values` for the table and the reasons of `absent` ones.

    Raises ArtifactError if there is nothing in the folder that `runtime` (None: any) can run.
    """
    kind = RUNTIMES[runtime_of(package, runtime)].format
    values: dict[str, Any] = {"format": kind}
    if (package / MANIFEST).is_file():
        artifact = open_artifact(package)
        known = ("format", "quant", "bytes", "bits_per_weight", "kl_mean", "top1") if kind != "hf" else ()
        values |= {key: artifact.metrics[key] for key in known if artifact.metrics.get(key) is not None}
        values["digest"] = artifact.digest
    if kind == "hf":
        values["quant"] = "fp32"
    if "bytes" not in values:
        sizes = {name: entry.size for name, entry in scan_files(package).items()}
        values["bytes"] = sum(size for name, size in sizes.items() if not name.startswith(LOG_DIR + "/"))
    unknown = ("quant", "digest", "bits_per_weight", "kl_mean", "top1")
    reason = NO_PACKAGE if kind == "hf" else "the package's manifest does not say"
    absent = {key: reason for key in unknown if key not in values}
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
            with Follower(report) as follower:
                for line in worker.stdout or ():
                    follower.line(line)
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


def _write_rows(path: Path, rows: Rows) -> str:
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)
