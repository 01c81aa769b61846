"""Students against their teacher, and distilling from cached targets against TRL's GKDTrainer with a live teacher.

`make bench-distill` trains one teacher and one student of a third of its size on 800 rows, and both sides of the
comparison on the same teacher; `FULL=1` also students of other sizes and without each ingredient, with 3 seeds, on
each data set, answered on 300 rows: a night on 2 cores. DATA names a folder with bitext_support.*.jsonl and
banking77.*.jsonl, without which the support bot's own rows are taken. Finished parts are kept, in the runs folder and
in results.json, and not done again. FULL=1 writes table.md and results.json beside this file after every student, the
first seed of all before the second. The last line is one line of JSON about the first data set.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.comparison import ROOT, as_chat, by_turns, maker, write_whole
from benchmarks.distill.common import Job
from benchmarks.distill.students import LEAN, Result, markdown, measure, typical, variants
from edgeft.formats.hf import read_config
from edgeft.pipeline import Pipeline
from edgeft.recipe import load_recipe

HERE = Path(__file__).parent
RECIPE = ROOT / "recipes" / "support-bot.yaml"
SIDES = {"edgeft": "benchmarks.distill.edgeft_side", "trl": "benchmarks.distill.trl_side"}
ROWS = ("data.max_train_rows=800", "train.epochs=1", "distill.epochs=8")
MANY_LABELS = ("data.max_train_rows=2400", "train.epochs=2", "distill.epochs=3")  # 77 labels, short rows
ASKED = 100, 300  # rows, without and with FULL=1
SEEDS = 3
GKD_STUDENT = ("student.layers=15", "student.vocabulary=null")  # GKDTrainer needs the teacher's vocabulary
GKD_ROWS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    args = parser.parse_args()
    results: dict[str, list[Result]] = {}
    peers = compared_before() if args.full else {}
    for name, settings in sources(args.data, args.runs, args.full):
        settings = (*settings, f"data.max_eval_rows={ASKED[args.full]}", f"name=bench-{name}")
        if name not in peers:
            peers[name] = against_gkd(args.runs, settings, args.threads, turns=3 if args.full else 1)
        results[name] = []
        if args.full:
            write_results(results, peers)
        for result in students(args.runs, settings, args.full):
            results[name].append(result)
            if args.full:
                write_results(results, peers)
    print(markdown_of(results, peers))
    name = next(iter(results))
    print(json.dumps(summary(name, typical(of_first_variant(results[name])), peers[name], whole=args.full)))


def compared_before() -> dict[str, Any]:
    """The comparisons with GKDTrainer of an earlier call, by data set, if this program made them on such a machine."""
    path = HERE / "results.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {name: one["gkd"] for name, one in found.items() if one["gkd"].get("made_by") == maker(HERE)}


def write_results(results: dict[str, list[Result]], peers: dict[str, Any]) -> None:
    record = {
        name: {"students": [r.record() for r in results.get(name, [])], "gkd": gkd} for name, gkd in peers.items()
    }
    write_whole(HERE / "results.json", json.dumps(record, indent=1) + "\n")
    made_by = maker(HERE)
    about = (
        f"{made_by['cpu']}, torch {made_by['torch']}, TRL {made_by['trl']}; teacher and students as Q8_0 in llama.cpp; "
        "medians over the seeds, least and most in brackets; what was kept: of the seed in the middle, by rows."
    )
    write_whole(HERE / "table.md", f"{about}\n\n{markdown_of(results, peers)}\n")


def markdown_of(results: dict[str, list[Result]], peers: dict[str, Any]) -> str:
    return "\n\n".join(f"## {name}\n\n{markdown(found)}\n\n{gkd_table(peers[name])}" for name, found in results.items())


def of_first_variant(results: list[Result]) -> list[Result]:
    return [one for one in results if (one.variant, one.part) == (results[0].variant, results[0].part)]


def sources(folder: Path | None, runs: Path, full: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and settings of each data set there is."""
    if folder is None:
        yield "support-bot", ROWS
        return
    work = runs / "bench-distill-data"
    work.mkdir(parents=True, exist_ok=True)
    halves = fresh_halves(folder / "bitext_support.dev.jsonl", work)
    yield "bitext", (*split_settings(folder / "bitext_support.train_freshslots.jsonl", *halves), *ROWS)
    if full:
        chats = [as_chat(folder / f"banking77.{split}.jsonl", work) for split in ("train", "dev", "test_open")]
        yield "banking77", (*split_settings(*chats), *MANY_LABELS, "data.target_field=null")


def split_settings(train: Path, validation: Path, test: Path) -> tuple[str, ...]:
    return f"data.train={train}", f"data.validation={validation}", f"data.test={test}"


def fresh_halves(dev: Path, work: Path) -> tuple[Path, Path]:
    """The rows with every digit of their entities drawn anew, so that no value can be remembered, in two halves."""
    draw = random.Random(0)
    rows = [with_fresh_digits(json.loads(line), draw) for line in dev.read_text("utf-8").splitlines()]
    draw.shuffle(rows)
    paths = work / "bitext.validation.jsonl", work / "bitext.test.jsonl"
    for path, half in zip(paths, (rows[::2], rows[1::2]), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in half), "utf-8")
    return paths


def with_fresh_digits(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The row with each entity's digits replaced, in the user's words and in the target alike."""
    user, meta = row["messages"][0], dict(row["meta"])
    for value in meta["entities"].values():
        fresh = "".join(str(draw.randrange(10)) if c.isdigit() else c for c in value)
        user = {**user, "content": user["content"].replace(value, fresh)}
        meta["entities"] = {k: fresh if v == value else v for k, v in meta["entities"].items()}
        meta["target_json"] = meta["target_json"].replace(value, fresh)
    return {**row, "messages": [user, *row["messages"][1:]], "meta": meta}


def students(runs: Path, settings: tuple[str, ...], full: bool) -> Iterator[Result]:
    base = Pipeline(load_recipe(RECIPE, settings), runs, sys.stderr).run("base")["base"]
    layers = read_config(base.path)["num_hidden_layers"]
    for seed in range(SEEDS if full else 1):
        for variant in variants(layers, full):
            result = measure(RECIPE, runs, variant, seed, settings)
            print(result, file=sys.stderr, flush=True)
            yield result


def against_gkd(runs: Path, settings: tuple[str, ...], threads: int, turns: int) -> dict[str, Any]:
    """The same student of half the layers, by edgeft on cached targets and by GKDTrainer with the teacher."""
    pipeline = Pipeline(load_recipe(RECIPE, (*settings, *LEAN, *GKD_STUDENT)), runs, sys.stderr)
    done = {**pipeline.run("student"), **pipeline.run("targets")}
    folders = {side: str(done[node].path) for side, node in GKD_INPUTS.items()}
    job = Job(**folders, rows=GKD_ROWS, threads=threads)
    targets = done["targets"].manifest
    per_row = targets.made_by["seconds"] / targets.metrics["rows"]
    found = by_turns(SIDES, job.dump(), threads, turns, "distilling")
    return {**found, "target_seconds_per_row": per_row, "turns": turns, "made_by": maker(HERE)}


GKD_INPUTS = {"teacher": "merge", "student": "student", "targets": "targets", "dataset": "data"}


def gkd_table(peers: dict[str, Any]) -> str:
    lines = ["| | rows/CPU-s | rows/s | peak RSS | val. loss | exact |", "|---|---:|---:|---:|---:|---:|"]
    for side in SIDES:
        one = peers[side]
        lines.append(
            f"| {side} | {one['rows_per_cpu_s']:.2f} | {one['rows_per_s']:.2f} | {one['peak_rss_bytes'] / 1e9:.1f} GB "
            f"| {one['val_loss']:.4f} | {100 * one['exact_match']:.1f}% |"
        )
    return "\n".join([*lines, f"\nThe targets took {peers['target_seconds_per_row']:.3f} s a row, once."])


def summary(name: str, student: Result, peers: dict[str, Any], whole: bool) -> dict[str, Any]:
    ours, theirs = peers["edgeft"], peers["trl"]
    return {
        "data": name,
        "slice": not whole,
        "student_bytes_ratio": student.bytes_ratio,
        "decode_speedup": student.decode_speedup,
        "retention": student.retention and student.retention[0],
        "retention_95": student.retention and student.retention[1:],
        "teacher_exact": student.teacher_exact,
        "n": student.n,
        "rows_per_s_ratio_vs_trl_gkd": ours["rows_per_cpu_s"] / theirs["rows_per_cpu_s"],
        "rss_ratio_vs_trl_gkd": ours["peak_rss_bytes"] / theirs["peak_rss_bytes"],
        "val_loss": ours["val_loss"],
        "trl_val_loss": theirs["val_loss"],
        "loss_vs_dense_targets": ours["loss_vs_dense"],
        "bytes_per_trained_token": student.bytes_per_trained_token,
    }


if __name__ == "__main__":
    main()
