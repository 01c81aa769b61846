"""How much faster edgeft measures the accuracy of a package than one request after another with a cold cache.

Both score the reference answer of every row and answer it greedily, in the same runtime, threads and process. The
plain way starts every request from an empty cache; ours shares the prompts' common prefix, batches rows, and goes on
from the reference where the model agrees with it. Answers may differ where two tokens are equally likely but for
rounding, because a batch adds up in another order than a single row: such rows are counted, and of these those whose
first line (the JSON) differs.

Run on a quiet machine: python benchmarks/speed/accuracy_rows.py PACKAGE TEST.jsonl [--examples TRAIN.jsonl]
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edgeft.bench.accuracy import Case, context_needed, prepare
from edgeft.bench.fewshot import few_shot_prefix
from edgeft.bench.host import host_facts, physical_cores
from edgeft.bench.session import Session, open_session
from edgeft.bench.task import Task

TASK = Task("intent", "entities")
ROWS, MAX_NEW_TOKENS = 96, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", type=Path, help="folder with model.gguf or model.onnx")
    parser.add_argument("data", type=Path, help="test rows (runs/data-.../test.jsonl)")
    parser.add_argument("--examples", type=Path, help="training rows: put --shots of them into every prompt")
    parser.add_argument("--shots", type=int, default=12)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the test set")
    parser.add_argument("--rounds", type=int, default=3, help="both ways in turns, so many times")
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()

    examples = few_shot_prefix(read(args.examples), TASK, args.shots) if args.examples else []
    print(json.dumps(measure(args.package, read(args.data)[: args.rows], args.threads, args.rounds, examples)))


def measure(
    package: Path, rows: list[dict[str, Any]], threads: int, rounds: int = 3, prefix: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Both ways in turns, `rounds` times, over test rows; `prefix`: messages before every prompt."""
    tokenizing = open_session(package, threads)
    cases = prepare(tokenizing, rows, TASK, prefix)
    tokenizing.close()
    session = open_session(package, threads, context_needed(cases, MAX_NEW_TOKENS))
    taken: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    answers: dict[str, list[list[int]]] = {}
    for number in range(rounds):
        for way in ("plain", "ours") if number % 2 == 0 else ("ours", "plain"):
            wall, cpu = time.perf_counter(), time.process_time()
            answers[way] = WAYS[way](session, cases, MAX_NEW_TOKENS)
            taken[way].append((time.perf_counter() - wall, time.process_time() - cpu))
            rate = len(cases) / taken[way][-1][0]
            print(f"round {number + 1}, {way}: {rate:.2f} rows/s", file=sys.stderr, flush=True)
    found = {"package": package.name, "threads": threads, **summary(session, cases, answers, taken)}
    session.close()
    return found


def plain(session: Session, cases: list[Case], max_new_tokens: int) -> list[list[int]]:
    """One request after another."""
    answers = []
    for case in cases:
        at = range(len(case.prompt_ids) - 1, len(case.prompt_ids) + len(case.reference_ids) - 1)
        for logits in session.score([([*case.prompt_ids, *case.reference_ids], at)]):
            assert len(logits) == len(case.reference_ids)
        answers.append(greedy(session, case.prompt_ids, max_new_tokens))
    return answers


def greedy(session: Session, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding from an empty cache, one token after another."""
    logits, answer = session.prefill(prompt_ids), []
    while len(answer) < max_new_tokens and (token := int(logits.argmax())) not in session.stop_ids:
        answer.append(token)
        logits = session.step(token)
    return answer


def ours(session: Session, cases: list[Case], max_new_tokens: int) -> list[list[int]]:
    """As `edgeft bench` does it."""
    return session.generate(
        [case.prompt_ids for case in cases], max_new_tokens, [case.reference_ids for case in cases], lambda row, _: None
    )


def summary(
    session: Session,
    cases: list[Case],
    answers: dict[str, list[list[int]]],
    taken: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    ratios = [[a[clock] / b[clock] for a, b in zip(taken["plain"], taken["ours"], strict=True)] for clock in (0, 1)]
    texts = {way: [session.decode(ids) for ids in found] for way, found in answers.items()}
    pairs = list(zip(texts["plain"], texts["ours"], strict=True))
    host = host_facts()
    return {
        "rows": len(cases),
        "prompt_tokens": median(len(case.prompt_ids) for case in cases),
        "rows_per_s": {way: median(len(cases) / wall for wall, _ in found) for way, found in taken.items()},
        "accuracy_rows_per_s_speedup": median(ratios[0]),
        "of_each_round": ratios[0],
        "in_cpu_time": median(ratios[1]),
        "answers_that_differ": sum(a != b for a, b in pairs),
        "first_lines_that_differ": sum(a.partition("\n")[0] != b.partition("\n")[0] for a, b in pairs),
        "host": {key: host[key] for key in ("cpu", "cores_physical", "load_average", "versions")},
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


WAYS = {"plain": plain, "ours": ours}

if __name__ == "__main__":
    main()
