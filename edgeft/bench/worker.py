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
from statistics import median
from typing import Any

from edgeft.bench import conditions, energy, speed
from edgeft.bench.host import host_facts, peak_rss
from edgeft.bench.runtimes import RUNTIMES, runtimes_of
from edgeft.bench.session import Session, open_session
from edgeft.errors import EdgeftError

FILLER = "The quick brown fox jumps over the lazy dog."  # a prompt to time when there are no rows
COLD_STARTS = 3
COLD_FIELDS = ("cold_load_s", "cold_ttft_s")
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
    seconds: float = 0.0
    precision: float = 0.0
    escalation: tuple[str, ...] = ()
    rows: str | None = None
    prefix: tuple[dict[str, Any], ...] = ()
    mmap: bool = True
    replaced: tuple[dict[str, Any], ...] = ()  # the prefix that a model without training would need
    cold: bool = True
    grammar: str | None = None  # GBNF to hold some answers to, beside the free ones
    choices: tuple[tuple[str, tuple[str, ...], int], ...] = ()  # multiple choice: query, choices, gold
    runtime: str | None = None  # None: the first that can run the package


def run(spec: Spec) -> dict[str, Any]:
    """Measure; returns what is written to `spec.out`."""
    host = host_facts()  # before the work, so that the load average is the machine's, not ours
    rows = _read_rows(spec.rows)
    package = Path(spec.package)
    context = speed.context_needed(spec.prompt_tokens, spec.decode_tokens)
    import_s = _import_runtime(package, spec.runtime)
    if spec.mmap:
        _read_through(package)
    start = time.perf_counter()
    session = _open(spec, context)
    load_s = time.perf_counter() - start
    before = conditions.look()
    prompt = _prompt(session, rows, spec.prompt_tokens)
    progress = Progress("speed", spec.repeats + 1)
    effort = speed.Effort(spec.repeats, spec.seconds, spec.precision)
    meter = energy.Meter()

    def on_repeat() -> None:
        meter.look()
        progress.advance()

    samples, summary = speed.measure(session, prompt, spec.decode_tokens, effort, on_repeat=on_repeat)
    after = conditions.look()
    peak, how = peak_rss()
    result: dict[str, Any] = {
        "figures": {"runtime": session.runtime, "load_s": load_s, **summary, "peak_rss_bytes": peak},
        "absent": {},
        "samples": samples,
        "rows": [],
        "details": {},
        "conditions": conditions.describe(before, after, samples, spec.threads),
        "host": {
            **host,
            "threads": spec.threads,
            "omp": {name: os.environ.get(name) for name in OMP_SETTINGS},
            "build": session.build,
            "import_s": import_s,
            "context_tokens": context,
            "peak_rss": f"{how} of the process after the speed part",
        },
    }
    try:
        result["figures"]["joules_per_token"] = meter.watts() * summary["decode_ms_p50"] / 1000
    except energy.Refused as reason:
        result["absent"]["joules_per_token"] = str(reason)
    session.close()  # its context fits the speed part; the rows may need a longer one
    if not spec.cold:
        result["absent"] |= dict.fromkeys(COLD_FIELDS, "no cold start was asked for")
    else:
        _measure_cold(result, package, prompt, spec, context)
    if rows:
        _measure_accuracy(result, rows, spec)
    result["choices"] = _measure_choices(spec) if spec.choices else None
    return result


def _measure_choices(spec: Spec) -> dict[str, Any]:
    from edgeft.bench import choices

    questions = [choices.Question(query, tuple(texts), gold) for query, texts, gold in spec.choices]
    tokenizing = _open(spec)
    rows = [row for question in questions for row in choices.tokenise(tokenizing, question)]
    tokenizing.close()
    session = _open(spec, max(len(ids) for ids, _ in rows))
    found = choices.evaluate(session, questions, rows, Progress("choices", len(rows)).advance)
    session.close()
    return found


def _measure_cold(result: dict[str, Any], package: Path, prompt: list[int], spec: Spec, context: int) -> None:
    """Load and answer again, with the files out of the page cache; the first token comes without any warm-up.

    Medians of COLD_STARTS.
    """
    if not hasattr(os, "posix_fadvise"):
        reason = "this system offers no way to put a file out of the page cache"
        result["absent"] |= dict.fromkeys(COLD_FIELDS, reason)
        return
    loads, firsts = list[float](), list[float]()
    for _ in range(COLD_STARTS):
        for path in _files(package):
            with path.open("rb") as f:
                os.fsync(f.fileno())  # what is not on the disk yet would stay
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        session = _open(spec, context)
        loads.append(time.perf_counter() - start)
        start = time.perf_counter()
        session.prefill(prompt).argmax()
        firsts.append(time.perf_counter() - start)
        session.close()
    result["figures"] |= {"cold_load_s": median(loads), "cold_ttft_s": median(firsts)}


def _read_through(package: Path) -> None:
    """Bring the files into the page cache: what is called a warm start is one."""
    for path in _files(package):
        with path.open("rb", buffering=0) as f:
            while f.read(1 << 24):
                pass


def _files(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*") if path.is_file())


def _open(spec: Spec, context: int = 2048) -> Session:
    choice: dict[str, Any] = {} if spec.mmap else {"mmap": False}
    if spec.runtime:
        choice["runtime"] = spec.runtime
    return open_session(Path(spec.package), spec.threads, context, **choice)


def _prompt(session: Session, rows: list[dict[str, Any]], length: int) -> list[int]:
    """`length` tokens of the rows' own conversations."""
    ids: list[int] = []
    for row in rows or [{"messages": [{"role": "user", "content": FILLER}, {}]}]:
        ids += session.prompt_ids(row["messages"][:-1])
        if len(ids) >= length:
            break
    return speed.prompt_of_length(ids, length)


def _measure_accuracy(result: dict[str, Any], rows: list[dict[str, Any]], spec: Spec) -> None:
    from edgeft.bench import accuracy  # its libraries must not count for the peak memory
    from edgeft.bench.task import Task

    task = Task(spec.label_key, spec.fields_key, spec.escalation)
    tokenizing = _open(spec)
    cases = accuracy.prepare(tokenizing, rows, task, spec.prefix)
    shown = accuracy.prepare(tokenizing, rows, task, spec.replaced) if spec.replaced else []
    tokenizing.close()
    session = _open(spec, accuracy.context_needed(cases, spec.max_new_tokens))
    progress = Progress("answers", len(cases))
    start = time.perf_counter()
    found = accuracy.evaluate(session, cases, task, spec.max_new_tokens, progress.advance)
    result["host"]["accuracy_s"] = time.perf_counter() - start
    if spec.grammar:
        found.details["held_to_grammar"] = _hold(session, cases, found.rows, task, spec)
    session.close()
    result["figures"] |= found.figures
    result["absent"] |= found.absent
    result["rows"], result["details"] = found.rows, found.details
    if shown:
        result["figures"]["replaced_tokens"] = float(median(len(case.prompt_ids) for case in shown))


def _hold(session: Session, cases: list[Any], free: list[dict[str, Any]], task: Any, spec: Spec) -> dict[str, Any]:
    from edgeft.bench import grammar

    if not isinstance(session, grammar.HoldsToGrammar):
        return {"absent": f"{session.runtime} cannot hold answers to a grammar"}
    progress = Progress("answers held to the grammar", min(grammar.ROWS, len(cases)))
    return grammar.evaluate(
        session, session, cases, free, task, str(spec.grammar), spec.max_new_tokens, progress.advance
    )


def _import_runtime(package: Path, wanted: str | None) -> float:
    """Seconds to import the package's runtime; an unknown package is `open_session`'s error."""
    start = time.perf_counter()
    for name in runtimes_of(package):
        if wanted in (None, name):
            import_module(RUNTIMES[name].session.partition(":")[0])
            break
    return time.perf_counter() - start


class Progress:
    """Tells the parent process how far one part is."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0

    def advance(self, count: int = 1) -> None:
        self._done = min(self._total, self._done + count)  # noise can ask for more repeats than were planned
        print(json.dumps({"what": self._what, "total": self._total, "done": self._done}), flush=True)


def _read_rows(path: str | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def main(spec_path: str) -> int:
    """Exit code: 0, or 2 with {"error"} in the result file for a problem that the user can solve."""
    raw = json.loads(Path(spec_path).read_text("utf-8"))
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    spec = Spec(**values)
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
