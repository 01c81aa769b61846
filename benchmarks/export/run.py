"""What the last support-bot run exports, beside what llama.cpp's and onnxruntime-genai's own tools make of its model.

Reads the newest finished report under --runs, and the merge, probes and packages it was made from; writes the ladder to
table.md beside this file and ends with one line of JSON. A figure that cannot be had is null, with the reason under
NAME_reason. llama.cpp's tools come from `make peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export.ladder import base_packages, decode_rates, table
from benchmarks.export.last_run import LastRun, Missing
from benchmarks.export.oracle import llama_divergences, llama_perplexity, own_divergence, own_perplexity
from benchmarks.export.sabotage import count
from edgeft.bench.host import physical_cores
from edgeft.bench.int4 import write_best_int4
from edgeft.bench.session import Session, open_session
from edgeft.errors import EdgeftError
from edgeft.formats import onnx
from edgeft.formats.gguf_reader import Reader
from edgeft.formats.gguf_vocab import pre_tokenizer_name
from edgeft.formats.importance import load_importance
from edgeft.formats.parity import Parity, compare
from edgeft.formats.probe import Probe
from edgeft.text.chat import ChatTokenizer
from tests.formats.llama_cpp_converter import DRIVER

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("EDGEFT_LLAMA_CPP", Path(sys.prefix) / "peers-llama" / "llama.cpp"))
NO_PEERS = "llama.cpp's tools are not built: `make peers`"
QUANT = "q4_k_m"  # whose making is timed, and whose divergence is measured twice
REPEATS = 3
# What onnxruntime-genai's builder offers for 4 bits; the best of it is held against ours of the same size.
BUILDER: dict[str, list[str]] = {
    "default": [],
    "k_quant": ["algo_config=k_quant"],
    "k_quant_mixed": ["algo_config=k_quant_mixed"],
}
BLOCKS = (16,)  # in which the weights are stored beside the run's own blocks, which make a smaller file
SAME_SIZE = 1.03  # times the builder's: what is no larger counts as of the same size
OURS = """
import sys
from pathlib import Path
from edgeft.formats.gguf import write_gguf
from edgeft.formats.gguf_quant import quantize
model, out, quant, threads = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
write_gguf(model, out / "f16.gguf", "f16")
quantize(out / "f16.gguf", out / "quantised.gguf", quant, threads)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    names = [*(f.__name__ for f in FIGURES), "base"]
    parser.add_argument("--skip", nargs="*", default=[], choices=names, help="leave figures out")
    args = parser.parse_args()
    try:
        run = LastRun(args.runs)
    except EdgeftError as error:
        raise SystemExit(str(error)) from None
    found: dict[str, Any] = {}
    for figures in FIGURES:
        found |= figures_or_reasons(figures, run, figures.__name__ in args.skip)
        print(json.dumps({name: found[name] for name in NAMES[figures]}), file=sys.stderr)
    with tempfile.TemporaryDirectory() as work:
        try:
            base = {} if "base" in args.skip else base_packages(run, Path(work))
        except (Missing, EdgeftError, OSError) as error:
            base, found["base_reason"] = {}, str(error)
        packages = {**run.packages(), **base}
        text = table(run, packages, decode_rates(packages))
    print(text)
    (HERE / "table.md").write_text(text + "\n", "utf-8")
    print(json.dumps(found))


def figures_or_reasons(
    figures: Callable[[LastRun, Path], dict[str, Any]], run: LastRun, skip: bool = False
) -> dict[str, Any]:
    """The figures, or null for each of their names and why it could not be had."""
    with tempfile.TemporaryDirectory() as work:
        try:
            if skip:
                raise Missing("left out")
            return figures(run, Path(work))
        except (Missing, EdgeftError, OSError) as error:
            reason = str(error)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace") if isinstance(error.stderr, bytes) else str(error.stderr)
            reason = f"{Path(str(error.cmd[0])).name} failed with {error.returncode}: {said.strip()[-300:]}"
    return {f"{name}{end}": value for name in NAMES[figures] for end, value in (("", None), ("_reason", reason))}


def sabotage(run: LastRun, work: Path) -> dict[str, Any]:
    """How many ways of breaking an export there are, and how many are noticed."""
    ways, caught = count()
    return {"sabotages": ways, "caught": caught}


def merge(run: LastRun, work: Path) -> dict[str, Any]:
    """Right first lines of the validation rows, as trained and as merged."""
    found = run.teacher.metrics
    return {
        "merge_score_adapter": found["validation_as_trained"]["exact_match"],
        "merge_score_merged": found["validation"]["exact_match"],
        "merge_into": found["into"],
    }


def identity(run: LastRun, work: Path) -> dict[str, Any]:
    """Tensors of our f16 file that llama.cpp's converter writes with equal bytes, and the time both take to QUANT.

    The two take turns, REPEATS times each; the ratio is that of the medians.
    """
    quantizer = PEERS / "build/bin/llama-quantize"
    if not quantizer.is_file():
        raise Missing(NO_PEERS)
    threads, model = str(physical_cores()), str(run.teacher.path)
    theirs = str(work / "theirs.gguf")
    pre = pre_tokenizer_name(json.loads((run.teacher.path / "tokenizer.json").read_text("utf-8")))
    sides = {
        "ours": [[sys.executable, "-c", OURS, model, str(work), QUANT, threads]],
        "theirs": [
            [sys.executable, "-c", DRIVER, str(PEERS), json.dumps([[model, theirs, "f16", pre]])],
            [str(quantizer), theirs, str(work / "their-quantised.gguf"), QUANT, threads],
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS):
        for name, commands in sides.items():
            seconds[name].append(_timed(commands))
    files = [{t.name: t for t in Reader(path).tensors} for path in (work / "f16.gguf", Path(theirs))]
    same = [n for n, t in files[0].items() if n in files[1] and t.data.tobytes() == files[1][n].data.tobytes()]
    return {
        "gguf_identical_tensors": len(same),
        "gguf_tensors": len(files[1]),
        "export_time_ratio_vs_llama_cpp": statistics.median(seconds["ours"]) / statistics.median(seconds["theirs"]),
        "export_seconds": {name: [round(s, 2) for s in found] for name, found in seconds.items()},
    }


def perplexity(run: LastRun, work: Path) -> dict[str, Any]:
    """Our perplexity over llama-perplexity's, of the teacher's f16 package on the same tokens of general text."""
    tool, full = _judge(), run.package("teacher-gguf-f16").file("model.gguf")
    ours = own_perplexity(full, ChatTokenizer.from_folder(run.teacher.path))
    return {"ppl_ratio_vs_llama_perplexity": ours / llama_perplexity(tool, full), "ppl": ours}


def divergence(run: LastRun, work: Path) -> dict[str, Any]:
    """How far the teacher's QUANT package is from its f16 one, by us over by llama-perplexity, on the same tokens.

    Its figure is the median over its settings.
    """
    tool = _judge()
    full, cut = (run.package(f"teacher-gguf-{quant}").file("model.gguf") for quant in ("f16", QUANT))
    ours = own_divergence(full, cut, ChatTokenizer.from_folder(run.teacher.path))
    theirs = llama_divergences(tool, full, cut, work)
    return {
        "kl_ratio_vs_llama_perplexity": ours / statistics.median(theirs.values()),
        f"kl_{QUANT}": ours,
        f"kl_{QUANT}_llama_perplexity": theirs,
    }


def _judge() -> Path:
    """llama-perplexity. Raises Missing."""
    tool = PEERS / "build/bin/llama-perplexity"
    if not tool.is_file():
        raise Missing(NO_PEERS)
    return tool


def int4(run: LastRun, work: Path) -> dict[str, Any]:
    """The best int4 graph of onnxruntime-genai's builder against ours of its size: KL from the torch model, and bytes.

    Ours are the run's package, and one with other blocks that is made now.
    """
    package, probe = run.package("teacher-onnx-int4"), run.probe
    ours = {"the run's": {"kl": package.metrics["kl_mean"], "bytes": _graph_bytes(package.path)}}
    ours[f"blocks of {BLOCKS[0]}"] = _other_blocks(run, work / "ours")
    found = {}
    for name, options in BUILDER.items():
        out = work / name
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(run.teacher.path)]
        command += ["-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
        command += ["--extra_options", *options] if options else []
        subprocess.run(command, check=True, capture_output=True)
        onnx.copy_files(run.teacher.path, out, onnx.MODEL_FILES)
        session = open_session(out, physical_cores(), context=max(map(len, probe.rows)))
        found[name] = {"kl": parity(session, probe).kl_mean, "bytes": _graph_bytes(out)}
    best = min(found, key=lambda name: found[name]["kl"])
    fitting = {n: f for n, f in ours.items() if f["bytes"] <= SAME_SIZE * found[best]["bytes"]} or ours
    chosen = min(fitting, key=lambda name: fitting[name]["kl"])
    return {
        "int4_kl": ours[chosen]["kl"],
        "int4_kl_genai_builder": found[best]["kl"],
        "int4_bytes_ratio": ours[chosen]["bytes"] / found[best]["bytes"],
        "int4_ours": chosen,
        "int4_ours_all": ours,
        "int4_genai_builder": best,
        "int4_genai_builder_all": found,
    }


def _other_blocks(run: LastRun, out: Path) -> dict[str, float]:
    """The teacher in int4 with BLOCKS, as the export stage makes it."""
    full, probe = run.package("teacher-onnx-fp32").path, run.probe
    importance = load_importance(run.made("importance", run.teacher).path)
    out.mkdir()
    onnx.copy_companions(full, out)
    write_best_int4(full / onnx.GRAPH, out, BLOCKS, importance, probe, physical_cores())
    session = open_session(out, physical_cores(), context=max(map(len, probe.rows)))
    return {"kl": parity(session, probe).kl_mean, "bytes": _graph_bytes(out)}


def parity(session: Session, probe: Probe) -> Parity:
    """Agreement of a package with the probe's torch model, on the task's rows."""
    rows, positions = probe.rows[: probe.task_rows], probe.positions[: probe.task_rows]
    try:
        scored = np.concatenate(list(session.score(list(zip(rows, positions, strict=True)))))
    finally:
        session.close()
    return compare(probe.logits_PV[: len(scored)], scored, probe.next_ids()[: len(scored)])


def _graph_bytes(package: Path) -> int:
    return sum(path.stat().st_size for path in package.glob("model.onnx*"))


def _timed(commands: list[list[str]]) -> float:
    start = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


NAMES: dict[Callable[[LastRun, Path], dict[str, Any]], tuple[str, ...]] = {
    sabotage: ("sabotages", "caught"),
    merge: ("merge_score_adapter", "merge_score_merged"),
    identity: ("gguf_identical_tensors", "export_time_ratio_vs_llama_cpp"),
    perplexity: ("ppl_ratio_vs_llama_perplexity",),
    divergence: ("kl_ratio_vs_llama_perplexity",),
    int4: ("int4_kl", "int4_kl_genai_builder", "int4_bytes_ratio"),
}
FIGURES = tuple(NAMES)

if __name__ == "__main__":
    main()
