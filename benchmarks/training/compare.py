"""Trains the same rows with edgeft and with TRL's SFTTrainer, each in processes of its own, taking turns.

`make bench-training` compares on some rows of one data set, `FULL=1` also on all of its rows, on other data sets with
shorter and longer rows, and with one thread: an hour and a quarter on 2 cores. DATA names a folder with
bitext_support.*.jsonl, banking77.*.jsonl and bitext_longreply.*.jsonl, without which the support bot's own rows are
taken. FULL=1 writes table.md and results.json beside this file after every comparison, and goes on from there if it
was cut off. The last line is one line of JSON about the first comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.comparison import MODEL, by_turns, datasets, maker, write_whole
from benchmarks.training.common import Job
from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.stages import base

HERE = Path(__file__).parent
ROWS, ALL_ROWS = 240, 10**6
SIDES = {"edgeft": "benchmarks.training.edgeft_side", "trl": "benchmarks.training.trl_side"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "base").mkdir()
        base.run(BaseSettings(model=MODEL), {}, work / "base", Reporter("base"))
        earlier, results = finished() if args.full else [], []
        for name, job, turns in jobs(work, args.data, args.full):
            known = next((one for one in earlier if result_of(name, job, one)), None)
            results.append(known or compared(name, job, turns))
            if args.full:
                write_whole(HERE / "results.json", json.dumps(results, indent=1) + "\n")
                write_whole(HERE / "table.md", markdown(results) + "\n")
    print(markdown(results))
    first = results[0]
    ours, theirs = first["edgeft"], first["trl"]
    print(
        json.dumps(
            {
                "data": first["data"],
                "threads": first["threads"],
                "rows": ours["rows"],
                "rows_per_cpu_s": ours["rows_per_cpu_s"],
                "trl_rows_per_cpu_s": theirs["rows_per_cpu_s"],
                "ratio": ours["rows_per_cpu_s"] / theirs["rows_per_cpu_s"],
                "val_loss": ours["val_loss"],
                "trl_val_loss": theirs["val_loss"],
                "exact_match": ours["exact_match"],
                "trl_exact_match": theirs["exact_match"],
                "gemm_share": ours["gemm_share"],
                "peak_rss_bytes": ours["peak_rss_bytes"],
                "trl_peak_rss_bytes": theirs["peak_rss_bytes"],
            }
        )
    )


def jobs(work: Path, folder: Path | None, full: bool) -> Iterator[tuple[str, Job, int]]:
    """What is trained, and in how many turns: the comparison that counts first, then how it changes."""
    (first, rows), *others = datasets(work, folder)

    def job(dataset: Path, rows: int, threads: int) -> Job:
        return Job(str(work / "base"), str(dataset), rows, threads)

    yield first, job(rows, ROWS, 2), 3 if full else 1
    if not full:
        return
    yield first, job(rows, ROWS, 1), 1
    for name, dataset in others:
        yield name, job(dataset, ROWS, 2), 1
        yield name, job(dataset, ROWS, 1), 1
    yield first, job(rows, ALL_ROWS, 2), 1


def compared(name: str, job: Job, turns: int) -> dict[str, Any]:
    label = f"{name}, {job.rows} rows, {job.threads} threads"
    found = by_turns(SIDES, job.dump(), job.threads, turns, label)
    return {
        "data": name,
        "asked_rows": job.rows,
        "threads": job.threads,
        "turns": turns,
        "made_by": maker(HERE),
        **found,
    }


def finished() -> list[dict[str, Any]]:
    """What an earlier call has measured with the same program on the same kind of machine."""
    path = HERE / "results.json"
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return [one for one in found if one.get("made_by") == maker(HERE)]


def result_of(name: str, job: Job, result: dict[str, Any]) -> bool:
    return (name, job.rows, job.threads) == (result["data"], result["asked_rows"], result["threads"])


def markdown(results: list[dict[str, Any]]) -> str:
    """Where it was measured, and a line for each side of each comparison."""
    made_by, turns = results[0]["made_by"], results[0]["turns"]
    about = (
        f"{made_by['cpu']}, torch {made_by['torch']}; fresh processes in turns, "
        f"{f'medians of {turns} turns in the first comparison, ' if turns > 1 else ''}one turn otherwise."
    )
    names = ("data", "rows", "tokens a row", "threads", "", "rows/CPU-s", "TRL's", "tokens/CPU-s", "rows/s",
             "GEMM rate", "peak RSS", "val. loss", "exact")  # fmt: skip
    lines = [about, "", f"| {' | '.join(names)} |", f"|---|{'---:|' * 3}---|{'---:|' * 8}"]
    for result in results:
        for side in SIDES:
            one = result[side]
            share = f"{100 * one['gemm_share']:.0f}%" if "gemm_share" in one else ""
            tokens = one["tokens_per_cpu_s"] / one["rows_per_cpu_s"]
            times = f"x {one['rows_per_cpu_s'] / result['trl']['rows_per_cpu_s']:.2f}"
            cells = (result["data"], f"{one['rows']:.0f}", f"{tokens:.0f}", f"{result['threads']}", side,
                     f"{one['rows_per_cpu_s']:.2f}", times if side == "edgeft" else "",
                     f"{one['tokens_per_cpu_s']:.0f}", f"{one['rows_per_s']:.2f}", share,
                     f"{one['peak_rss_bytes'] / 1e9:.1f} GB", f"{one['val_loss']:.4f}",
                     f"{100 * one['exact_match']:.1f}%")  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
