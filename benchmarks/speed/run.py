"""Whether edgeft's figures are those of the tools whose runtimes it uses, on the last support-bot run.

- prefill and decode rates beside llama-bench's and onnxruntime-genai's own, same file, threads and lengths, in fresh
  processes that take turns; then once more while another process keeps a core busy;
- perplexity beside llama-perplexity's; accuracy on BLiMP and ARC-Easy beside lm-evaluation-harness's HF model;
- rows of a test set per second beside one request after another.

Writes table.md beside this file and ends with one line of JSON. A figure that cannot be had is null, with the reason
under NAME_reason. llama.cpp's tools come from `make peers`, the harness from `make bench-speed`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.comparison import ROOT
from benchmarks.export.last_run import LastRun, Missing
from benchmarks.export.run import PEERS, perplexity
from benchmarks.speed import accuracy_rows
from edgeft.bench.conditions import busy_now
from edgeft.bench.host import host_facts, physical_cores
from edgeft.bench.run import time_package
from edgeft.bench.stats import mcnemar_exact
from edgeft.errors import EdgeftError
from edgeft.settings import BenchSettings

HERE = Path(__file__).parent
LM_EVAL = Path(os.environ.get("EDGEFT_LM_EVAL", Path(sys.prefix) / "peers-lm-eval"))
PROMPT, DECODED, REPEATS = 128, 64, 9  # tokens and tokens; repeats in each process
GGUF, ONNX, REFERENCE = "teacher-gguf-q8_0", "teacher-onnx-int8", "teacher-gguf-f16"
RATES = ("prefill_tps", "decode_tps")
BUSY = "while True: pass"
LACKS = (Missing, EdgeftError, subprocess.CalledProcessError, OSError, ValueError)  # what a machine or a run may lack
AGREES = 0.03  # largest difference from llama-bench
CONDITIONS = ("quiet", "loaded")

Rates = dict[str, float]
Side = Callable[[], Rates]


class Ratio(NamedTuple):
    """Ours over theirs: of the medians, and the least and most of the turns."""

    medians: float
    least: float
    most: float


@dataclass
class Bench:
    """What is compared, how often, and the lines of the table so far."""

    runs: LastRun
    rounds: int
    threads: int
    data: Path | None
    lines: list[str] = field(default_factory=list)

    def package(self, node: str) -> Path:
        """The package of a node of the plan. Raises Missing if there is none."""
        return self.runs.package(node).path

    def in_turns(self, names: tuple[str, str], ours: Side, theirs: Side) -> dict[str, dict[str, Ratio]]:
        """{condition: {rate: ratio}}; the table gets a line for each."""
        ratios = {}
        for condition in CONDITIONS:
            sides: dict[str, list[Rates]] = {"ours": [], "theirs": []}
            with load(condition == "loaded"):
                for number in range(self.rounds):
                    for name, side in (("ours", ours), ("theirs", theirs))[:: 1 if number % 2 == 0 else -1]:
                        sides[name].append(side())
                    print(f"{names[0]} and {names[1]}, {condition}, {number + 1}", file=sys.stderr, flush=True)
            ratios[condition] = {rate: self._line(names, condition, rate, sides) for rate in RATES}
        return ratios

    def _line(self, names: tuple[str, str], condition: str, rate: str, sides: dict[str, list[Rates]]) -> Ratio:
        ours, theirs = ([one[rate] for one in sides[side]] for side in ("ours", "theirs"))
        pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        ratio = Ratio(median(ours) / median(theirs), pairs[0], pairs[-1])
        cells = (*names, rate.removesuffix("_tps"), condition, spread(ours), spread(theirs), f"{ratio.medians:.3f}",
                 f"{ratio.least:.3f} to {ratio.most:.3f}")  # fmt: skip
        self.lines.append(f"| {' | '.join(cells)} |")
        return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of artifacts")
    parser.add_argument("--rounds", type=int, default=10, help="processes of each side, in turns")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--data", type=Path, help="folder with *arc_easy*.jsonl: rows of query, choices and gold")
    parser.add_argument(
        "--only", nargs="*", choices=[f.__name__ for f in FIGURES], help="figures to take; default: all"
    )
    args = parser.parse_args()
    found: dict[str, Any] = {name: None for names in FIGURES.values() for name in names}
    try:
        bench = Bench(LastRun(args.runs), args.rounds, args.threads, args.data)
    except LACKS as reason:
        print(json.dumps(found | {f"{name}_reason": said(reason) for name in found}))
        return
    busy = busy_now(args.threads)
    for figures, names in FIGURES.items():
        try:
            if args.only is not None and figures.__name__ not in args.only:
                raise Missing("left out")
            found |= figures(bench)
        except Exception as reason:  # one figure's mistake must not cost the others, which took an hour
            found |= {f"{name}_reason": f"{type(reason).__name__}: {said(reason)}" for name in names}
    if bench.lines:
        text = table(bench, busy)
        print(text)
        (HERE / "table.md").write_text(text + "\n", "utf-8")
    print(json.dumps(found))


def llama_bench(bench: Bench) -> dict[str, Any]:
    """Rates of llama.cpp, by edgeft and by llama-bench. Its decode starts behind a prompt, as ours does."""
    tool, package = PEERS / "build/bin/llama-bench", bench.package(GGUF)
    if not tool.is_file():
        raise Missing("llama.cpp's tools are not built: `make peers`")

    def theirs() -> Rates:
        lengths = {"prefill_tps": (PROMPT, 0, 0), "decode_tps": (0, DECODED, PROMPT)}
        return {rate: _llama_bench(tool, package, bench.threads, *three) for rate, three in lengths.items()}

    ratios = bench.in_turns(("llama.cpp", "llama-bench"), lambda: ours(bench, package, "llama.cpp"), theirs)
    agrees = all(abs(ratio.medians - 1) <= AGREES for ratio in ratios["quiet"].values())
    return named("_vs_llama_bench", ratios) | {"within_3_percent_of_llama_bench": agrees}


def _llama_bench(tool: Path, package: Path, threads: int, prompt: int, decoded: int, depth: int) -> float:
    command = [str(tool), "-m", str(package / "model.gguf"), "-t", str(threads), "-r", str(REPEATS), "-o", "json"]
    command += ["-p", str(prompt), "-n", str(decoded), "-d", str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [found] = json.loads(done.stdout)
    return float(median(found["samples_ts"]))


def genai(bench: Bench) -> dict[str, Any]:
    """Rates of onnxruntime-genai, by edgeft and by its own loop; and those of plain onnxruntime beside that loop."""
    package = bench.package(ONNX)
    job = {"package": str(package), "threads": bench.threads, "prompt_tokens": PROMPT, "decode_tokens": DECODED}

    def theirs() -> Rates:
        command = [sys.executable, str(HERE / "genai_loop.py"), json.dumps({**job, "repeats": REPEATS})]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rates: Rates = json.loads(done.stdout.splitlines()[-1])
        return rates

    found: dict[str, Any] = {}
    for runtime, name in (("genai", ""), ("onnxruntime", "_of_onnxruntime")):
        ratios = bench.in_turns((runtime, "genai's own loop"), lambda r=runtime: ours(bench, package, r), theirs)
        found |= named(f"{name}_vs_genai", ratios)
    return found


def ours(bench: Bench, package: Path, runtime: str) -> Rates:
    """As `edgeft bench` measures, in a fresh process."""
    settings = BenchSettings(
        threads=bench.threads, prompt_tokens=PROMPT, decode_tokens=DECODED, repeats=REPEATS, seconds=0
    )
    figures = time_package(package, settings, runtime=runtime)
    return {rate: figures[rate] for rate in RATES}


def named(name: str, ratios: dict[str, dict[str, Ratio]]) -> dict[str, Any]:
    """{"decode_ratio_vs_...": ..., "decode_ratio_vs_..._loaded": ...}, the same of prefill, and "..._turns": the least
    and the most of single turns."""
    found: dict[str, Any] = {}
    for condition, by_rate in ratios.items():
        for rate, ratio in by_rate.items():
            key = f"{rate.removesuffix('_tps')}_ratio{name}{'' if condition == 'quiet' else '_loaded'}"
            found |= {key: ratio.medians, f"{key}_turns": [ratio.least, ratio.most]}
    return found


def text_perplexity(bench: Bench) -> dict[str, Any]:
    """Ours over llama-perplexity's, of the f16 package on general text."""
    with tempfile.TemporaryDirectory() as work:
        return perplexity(bench.runs, Path(work))


def harness(bench: Bench) -> dict[str, Any]:
    """lm-evaluation-harness: the f16 package through edgeft, and the model it was made from through its HF backend."""
    if not (LM_EVAL / "lm_eval").is_dir():
        raise Missing("lm-evaluation-harness is not installed: `make bench-speed` does it")
    arc = next(iter(sorted(bench.data.glob("*arc_easy*.jsonl"))), None) if bench.data else None
    tasks = {"blimp": str(HERE / "blimp.jsonl")} | ({"arc_easy": str(arc.resolve())} if arc else {})
    sides = {"ours": ("edgeft", bench.package(REFERENCE)), "hf": ("hf", bench.runs.teacher.path)}
    jobs = {
        side: {"kind": k, "model": str(p), "threads": bench.threads, "tasks": tasks} for side, (k, p) in sides.items()
    }
    results = {side: _lm_eval(job) for side, job in jobs.items()}
    found: dict[str, Any] = {} if arc else {"lm_eval_arc_easy_reason": "no ARC-Easy rows: give their folder as DATA"}
    for name in tasks:
        one, other = (results[side][name]["hits"] for side in sides)
        found |= {f"lm_eval_{name}_{side}": results[side][name]["acc"] for side in sides}
        won, lost = (sum(a and not b for a, b in zip(*both, strict=True)) for both in ((one, other), (other, one)))
        found |= {f"lm_eval_{name}_n": len(one), f"lm_eval_{name}_differ": lost + won}
        found[f"lm_eval_{name}_p"] = mcnemar_exact(lost, won)
    return found


def _lm_eval(job: dict[str, Any]) -> dict[str, Any]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(LM_EVAL), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.speed.lm_eval_side", json.dumps(job)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows_per_second(bench: Bench) -> dict[str, Any]:
    """Rows of the test set per second, against one request after another with an empty cache."""
    rows = accuracy_rows.read(bench.runs.dataset.file("test.jsonl"))[: accuracy_rows.ROWS]
    found = {node: accuracy_rows.measure(bench.package(node), rows, bench.threads) for node in (GGUF, ONNX)}
    speedup = "accuracy_rows_per_s_speedup"
    return {
        speedup: found[GGUF][speedup],
        f"{speedup}_of_onnxruntime": found[ONNX][speedup],
        "accuracy_rows": found,
    }


@contextmanager
def load(wanted: bool) -> Iterator[None]:
    """With another process that keeps one core busy, if wanted."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
        try:
            yield
        finally:
            busy.kill()


def spread(rates: list[float]) -> str:
    return f"{median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def said(reason: Exception) -> str:
    """An exception in one line; of a process that failed, its last words."""
    words = getattr(reason, "stderr", None)
    return f"{reason}: {words.strip().splitlines()[-1]}" if words and words.strip() else str(reason)


def table(bench: Bench, busy: float) -> str:
    """Markdown: what was compared with what, tokens per second, and the ratios."""
    host = host_facts()
    versions = ", ".join(
        f"{k} {v}" for k, v in host["versions"].items() if k in ("llama-cpp-python", "onnxruntime-genai")
    )
    lines = [
        f"{host['cpu']}, {bench.threads} threads, {versions}; {GGUF} and {ONNX}; prompts of {PROMPT} tokens, {DECODED} "
        f"decoded behind them. Tokens per second: median (least to most) of {bench.rounds} fresh processes of each, in "
        f"turns, {REPEATS} repeats in each; ratio of the medians, and of each turn. Loaded: one more process keeps a "
        f"core busy. Before it began others used {busy:.0%} of the cores.",
        "",
        "| edgeft with | beside | rate | machine | edgeft | the other | ratio | of each turn |",
        "|---|---|---|---|--:|--:|--:|--:|",
        *bench.lines,
    ]
    return "\n".join(lines)


FIGURES: dict[Callable[[Bench], dict[str, Any]], tuple[str, ...]] = {
    llama_bench: ("decode_ratio_vs_llama_bench", "prefill_ratio_vs_llama_bench"),
    genai: ("decode_ratio_vs_genai", "prefill_ratio_vs_genai"),
    text_perplexity: ("ppl_ratio_vs_llama_perplexity",),
    harness: ("lm_eval_blimp_ours", "lm_eval_blimp_hf", "lm_eval_arc_easy_ours", "lm_eval_arc_easy_hf"),
    rows_per_second: ("accuracy_rows_per_s_speedup",),
}

if __name__ == "__main__":
    main()
