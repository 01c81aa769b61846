"""`python -m edgeft.bench.devices.worker PACKAGE JOB.json OUT.json`: a job in Python, for any package that runs here.

The native runner's counterpart for targets with a Python of their own, and the reference that it is tested against.
`--version` prints one JSON line. A problem that the user can solve ends with code 2 and {"error"} in the result.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import __version__
from edgeft.bench import conditions, speed
from edgeft.bench.devices.job import RUNNER, Job, RowJob, job_of
from edgeft.bench.host import peak_rss
from edgeft.bench.session import Logits, Session, open_session
from edgeft.bench.told import told
from edgeft.bench.worker import Progress
from edgeft.errors import EdgeftError


def run(package: Path, job: Job, folder: Path) -> dict[str, Any]:
    """What is written to OUT.json; the forced rows' logits [P, V] go to the job's file in `folder`."""
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    start = time.perf_counter()
    session = open_session(package, job.threads, job.context)
    load_s = time.perf_counter() - start
    if job.stop_ids and set(job.stop_ids) != session.stop_ids:
        session.close()
        raise EdgeftError(
            f"the package stops at the tokens {sorted(session.stop_ids)} here, the job says {sorted(job.stop_ids)}",
            "use the same version of edgeft on both machines",
        )
    result: dict[str, Any] = {"runner": RUNNER, "runtime": session.runtime, "build": session.build, "load_s": load_s}
    result |= _time(session, job)
    result |= _answer(session, job)
    result["forced"] = _force(session, job, folder)
    session.close()
    return result


def _time(session: Session, job: Job) -> dict[str, Any]:
    before = conditions.look()
    found: dict[str, Any] = {"samples": [], "warm_ups": 0}
    if job.speed:
        progress = Progress("speed", job.speed.repeats + 1)
        effort = speed.Effort(job.speed.repeats, seconds=0.0, precision=0.0)
        samples, summary = speed.measure(
            session, job.speed.prompt, job.speed.decode_tokens, effort, on_repeat=progress.advance
        )
        found = {"samples": samples, "warm_ups": int(summary["warm_ups"])}
    after = conditions.look()
    peak, how = peak_rss()
    memory = {"peak_rss_bytes": peak, "peak_rss": f"{how} of the process after the speed part"}
    return {**found, "before": asdict(before), "after": asdict(after), **memory}


def _answer(session: Session, job: Job) -> dict[str, Any]:
    rows: list[RowJob] = list(job.rows)
    progress = Progress("answers", len(rows))
    references: list[dict[str, Any]] = [_told(np.empty((0, 1), np.float32), []) for _ in rows]

    def on_draft(index: int, logits_PV: Logits) -> None:
        references[index] = _told(logits_PV, rows[index].reference)
        progress.advance()

    drafts = [row.reference for row in rows]
    answers = session.generate([row.prompt for row in rows], job.max_new_tokens, drafts, on_draft) if rows else []
    return {"answers": answers, "references": references}


def _force(session: Session, job: Job, folder: Path) -> list[dict[str, Any]]:
    found = []
    progress = Progress("forced", len(job.forced))
    partial = folder / f"{job.logits}.partial"
    with partial.open("wb") if job.logits else nullcontext() as out:
        scored = session.score([(row.ids, row.positions) for row in job.forced]) if job.forced else ()
        for row, logits_PV in zip(job.forced, scored, strict=True):
            following = [row.ids[at + 1] if at + 1 < len(row.ids) else None for at in row.positions]
            found.append(_told(logits_PV, following))
            if out:
                out.write(np.ascontiguousarray(logits_PV, "<f4").data)
            progress.advance()
    if job.logits:
        os.replace(partial, folder / job.logits)
    return found


def _told(logits_PV: Logits, following: Sequence[int | None]) -> dict[str, Any]:
    """`following`: the tokens that really follow; None where none does."""
    if not following:
        return {"next_logprob": [], "argmax": [], "top_logprob": []}
    found = told(logits_PV, np.array([token or 0 for token in following], np.int64))
    chances = zip(found.next_logprob.tolist(), following, strict=True)
    return {
        "next_logprob": [None if token is None else chance for chance, token in chances],
        "argmax": found.likeliest.tolist(),
        "top_logprob": found.top_logprob.tolist(),
    }


def version() -> dict[str, Any]:
    """The line of `--version`."""
    return {"runner": RUNNER, "edgeft": __version__, "arch": platform.machine(), "python": platform.python_version()}


def main(args: list[str]) -> int:
    if args == ["--version"]:
        print(json.dumps(version()))
        return 0
    package, job_path, out = (Path(arg) for arg in args)
    try:
        result = run(package, _read(job_path), out.parent)
    except EdgeftError as error:
        result = {"runner": RUNNER, "error": {"message": error.message, "hint": error.hint}}
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(result), "utf-8")
    os.replace(partial, out)
    return 2 if "error" in result else 0


def _read(path: Path) -> Job:
    try:
        return job_of(path.read_text("utf-8"))
    except ValueError as error:
        raise EdgeftError(str(error), "use the same version of edgeft on both machines") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
