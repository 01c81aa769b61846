"""Trains the same rows with edgeft and with TRL's SFTTrainer, each in processes of its own, taking turns.

`make bench-training` runs a short form, `FULL=1` all of it; DATA names a folder with bitext_support.*.jsonl and
banking77.*.jsonl, without which the support bot's own rows are taken. Writes table.md and results.json beside this
file with FULL=1, into the work folder otherwise, and ends with one line of JSON. Figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.comparison import MODEL, by_turns, datasets
from benchmarks.training.common import Job
from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.stages import base

HERE = Path(__file__).parent
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
        results = [compared(name, job, 3 if args.full else 1) for name, job in jobs(work, args.data, args.full)]
    table = markdown(results)
    print(table)
    if args.full:
        (HERE / "table.md").write_text(table + "\n", "utf-8")
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
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


def jobs(work: Path, folder: Path | None, full: bool) -> Iterator[tuple[str, Job]]:
    """What is trained: some rows of one data set; in full also all of them, other sets, longer rows, one thread."""
    sources = list(datasets(work, folder))
    for number, (name, dataset) in enumerate(sources):
        for threads in (1, 2) if full else (2,):
            for rows in (240, 1080) if full and number == 0 else (1080,) if full else (240,):
                yield name, Job(str(work / "base"), str(dataset), rows, threads)
        if not full:
            return


def compared(name: str, job: Job, turns: int) -> dict[str, Any]:
    label = f"{name}, {job.rows} rows, {job.threads} threads"
    found = by_turns(SIDES, job.dump(), job.threads, turns, label)
    return {"data": name, "threads": job.threads, "turns": turns, **found}


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| data | rows | threads | | rows/CPU-s | tokens/CPU-s | rows/s | GEMM rate | peak RSS | val. loss | exact |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        for side in SIDES:
            one = result[side]
            share = f"{100 * one['gemm_share']:.0f}%" if "gemm_share" in one else ""
            lines.append(
                f"| {result['data']} | {one['rows']:.0f} | {result['threads']} | {side} | {one['rows_per_cpu_s']:.2f} "
                f"| {one['tokens_per_cpu_s']:.0f} | {one['rows_per_s']:.2f} | {share} "
                f"| {one['peak_rss_bytes'] / 1e9:.1f} GB | {one['val_loss']:.4f} | {100 * one['exact_match']:.1f}% |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
