"""`python -m edgeft.bench.worker SPEC.json`: open one package in this fresh process and measure it.

Speed and peak memory come first, before anything that the accuracy part needs is loaded. Progress
goes to stdout as JSON lines {"what", "total", "done"}; the result goes to the file named in the spec.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgeft.bench import speed
from edgeft.bench.host import host_facts
from edgeft.bench.session import SESSIONS, Session, open_session
from edgeft.errors import EdgeftError

FILLER = "The quick brown fox jumps over the lazy dog."  # a prompt to time when there are no rows
OMP_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@dataclass(frozen=True)
class Spec:
    """What the parent process asks for. `rows`: a .jsonl file of test rows, or None for speed alone."""

    package: str
    out: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    repeats: int
    max_new_tokens: int
    label_key: str
    fields_key: str
    rows: str | None = None
    prefix: tuple[dict[str, Any], ...] = ()
    mmap: bool = True


def run(spec: Spec) -> dict[str, Any]:
    """Measure; returns what is written to `spec.out`."""
    host = host_facts()  # before the work, so that the load average is the machine's, not ours
    rows = _read_rows(spec.rows)
    package = Path(spec.package)
    import_s = _import_runtime(package)
    start = time.perf_counter()
    context = speed.context_needed(spec.prompt_tokens, spec.decode_tokens)
    session = _open(spec, context)
    load_s = time.perf_counter() - start
    samples, summary = _measure_speed(session, rows, spec)
    peak, how = peak_rss()
    result: dict[str, Any] = {
        "figures": {"runtime": session.runtime, "load_s": load_s, **summary, "peak_rss_bytes": peak},
        "absent": {},
        "samples": samples,
        "rows": [],
        "host": {
            **host,
            "threads": spec.threads,
            "omp": {name: os.environ.get(name) for name in OMP_SETTINGS},
            "import_s": import_s,
            "context_tokens": context,
            "peak_rss": how,
        },
    }
    if rows:
        del session  # its context fits the speed part; the rows may need a longer one
        _measure_accuracy(result, rows, spec)
    return result


def peak_rss() -> tuple[int, str]:
    """Largest resident memory of this process so far in bytes, and how it was read."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "VmHWM of the process after the speed part"
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset), "peak working set of the process after the speed part"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss of the process after the speed part"


def _open(spec: Spec, context: int = 2048) -> Session:
    choice = {} if spec.mmap else {"mmap": False}
    return open_session(Path(spec.package), spec.threads, context, **choice)


def _measure_speed(
    session: Session, rows: list[dict[str, Any]], spec: Spec
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    ids: list[int] = []
    for row in rows or [{"messages": [{"role": "user", "content": FILLER}, {}]}]:
        ids += session.prompt_ids(row["messages"][:-1])
        if len(ids) >= spec.prompt_tokens:
            break
    total = spec.repeats + 1
    progress = _Progress("speed", total)
    return speed.measure(
        session,
        speed.prompt_of_length(ids, spec.prompt_tokens),
        spec.decode_tokens,
        spec.repeats,
        on_repeat=progress.advance,
    )


def _measure_accuracy(result: dict[str, Any], rows: list[dict[str, Any]], spec: Spec) -> None:
    from edgeft.bench import accuracy  # its libraries must not count for the peak memory
    from edgeft.bench.task import Task

    task = Task(spec.label_key, spec.fields_key)
    tokenizing = _open(spec)
    cases = accuracy.prepare(tokenizing, rows, task, spec.prefix)
    del tokenizing
    session = _open(spec, accuracy.context_needed(cases, spec.max_new_tokens))
    progress = {what: _Progress(what, len(cases)) for what in ("answers", "perplexity")}
    found = accuracy.evaluate(session, cases, task, spec.max_new_tokens, lambda what, n: progress[what].advance(n))
    result["figures"] |= found.figures
    result["absent"] |= found.absent
    result["rows"] = found.rows


def _import_runtime(package: Path) -> float:
    """Seconds to import the package's runtime; an unknown package is `open_session`'s error."""
    start = time.perf_counter()
    for name, target in SESSIONS.items():
        if (package / name).is_file():
            import_module(target.partition(":")[0])
            break
    return time.perf_counter() - start


class _Progress:
    """Tells the parent process how far one part is."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0

    def advance(self, count: int = 1) -> None:
        self._done += count
        print(json.dumps({"what": self._what, "total": self._total, "done": self._done}), flush=True)


def _read_rows(path: str | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def main(spec_path: str) -> int:
    """Exit code: 0, or 2 with {"error"} in the result file for a problem that the user can solve."""
    raw = json.loads(Path(spec_path).read_text("utf-8"))
    spec = Spec(**{**raw, "prefix": tuple(raw["prefix"])})
    try:
        result = run(spec)
    except EdgeftError as error:
        result = {"error": {"message": error.message, "hint": error.hint}}
    Path(spec.out).write_text(json.dumps(result), "utf-8")
    return 2 if "error" in result else 0


def spec_json(spec: Spec) -> str:
    """The spec as the text that `main` reads."""
    return json.dumps(asdict(spec))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
