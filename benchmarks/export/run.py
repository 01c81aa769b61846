"""What the last support-bot run exports, beside what llama.cpp's and onnxruntime-genai's own tools make of its model.

Reads the newest finished merge, its probe and its packages from --runs; writes table.md beside this file and ends with
one line of JSON. A figure that cannot be had is null, with the reason under NAME_reason. llama.cpp's tools come from
`make peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.export.sabotage import count
from edgeft.artifact import Artifact, open_artifact
from edgeft.bench.host import physical_cores
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.bench.session import Session, open_session
from edgeft.errors import EdgeftError
from edgeft.formats import onnx
from edgeft.formats.gguf_vocab import pre_tokenizer_name
from edgeft.formats.parity import Parity, compare
from edgeft.formats.probe import Probe
from edgeft.text.chat import ChatTokenizer
from tests.formats.llama_cpp_converter import DRIVER

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = Path(os.environ.get("EDGEFT_LLAMA_CPP", Path(sys.prefix) / "peers-llama" / "llama.cpp"))
TEXT = ROOT / "edgeft/text/general.txt"
WINDOW = 256  # tokens of one chunk of llama-perplexity, which judges the second half of it
QUANT = "q4_k_m"  # whose making is timed
# Mean KL on wikitext-2 of Llama-3-8B: llama.cpp's tools/perplexity/README.md
PUBLISHED = {"q8_0": 0.0014, "q6_k": 0.0055, "q5_k_m": 0.0108, "q4_k_m": 0.0313, "q4_0": 0.0719, "q2_k": 0.4451}
OURS = """
import sys
from pathlib import Path
from edgeft.formats.gguf import write_gguf
from edgeft.formats.gguf_quant import quantize
model, out, quant, threads = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
write_gguf(model, out / "f16.gguf", "f16")
quantize(out / "f16.gguf", out / "quantised.gguf", quant, threads)
"""


class Missing(Exception):
    """Why a figure cannot be had."""


class LastRun:
    """The newest finished merge under `runs` and the artifacts that belong to it."""

    def __init__(self, runs: Path) -> None:
        found = [open_artifact(path.parent) for path in runs.glob("*/manifest.json")]
        self.all = sorted(found, key=lambda a: str(a.manifest.made_by.get("finished", "")))
        merges = [a for a in self.all if a.manifest.stage == "merge"]
        if not merges:
            raise EdgeftError(f"{runs} holds no finished merge", "run `make recipe-support-bot` first, or name --runs")
        self.model = merges[-1]
        self.probe = Probe.load(self.made("probe", self.model).path)

    def made(self, stage: str, model: Artifact) -> Artifact:
        """The newest artifact that a stage made of a model."""
        found = [a for a in self.all if a.manifest.stage == stage and a.manifest.inputs.get("model") == model.digest]
        if not found:
            raise Missing(f"the run has no finished {stage}")
        return found[-1]

    def packages(self) -> list[Artifact]:
        """The newest package of every node of the plan."""
        return list({a.manifest.made_by["node"]: a for a in self.all if a.manifest.stage == "export"}.values())

    def decode_tps(self, package: Artifact) -> float | None:
        for a in reversed(self.all):
            if a.manifest.stage == "bench" and a.manifest.inputs.get("package") == package.digest:
                return float(a.metrics["decode_tps"])
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=[f.__name__ for f in FIGURES], help="leave figures out"
    )
    args = parser.parse_args()
    run = LastRun(args.runs)
    found: dict[str, Any] = {}
    for figures in FIGURES:
        with tempfile.TemporaryDirectory() as work:
            try:
                if figures.__name__ in args.skip:
                    raise Missing("left out")
                found |= figures(run, Path(work))
            except Missing as reason:
                for name in NAMES[figures]:
                    found |= {name: None, f"{name}_reason": str(reason)}
    text = table(run)
    print(text)
    (HERE / "table.md").write_text(text + "\n", "utf-8")
    print(json.dumps(found))


def sabotage(run: LastRun, work: Path) -> dict[str, Any]:
    """How many ways of breaking an export there are, and how many are noticed."""
    ways, caught = count()
    return {"sabotages": ways, "caught": caught}


def merge(run: LastRun, work: Path) -> dict[str, Any]:
    """Right first lines of the validation rows, as trained and as merged."""
    found = run.model.metrics
    return {
        "merge_score_adapter": found["validation_as_trained"]["exact_match"],
        "merge_score_merged": found["validation"]["exact_match"],
    }


def identity(run: LastRun, work: Path) -> dict[str, Any]:
    """Tensors of our f16 file that llama.cpp's converter writes with equal bytes, and the time both take to QUANT."""
    quantizer = PEERS / "build/bin/llama-quantize"
    if not quantizer.is_file():
        raise Missing("llama.cpp's tools are not built: `make peers`")
    threads, model = str(physical_cores()), str(run.model.path)
    theirs = str(work / "theirs.gguf")
    pre = pre_tokenizer_name(json.loads((run.model.path / "tokenizer.json").read_text("utf-8")))
    sides = {
        "ours": [[sys.executable, "-c", OURS, model, str(work), QUANT, threads]],
        "theirs": [
            [sys.executable, "-c", DRIVER, str(PEERS), json.dumps([[model, theirs, "f16", pre]])],
            [str(quantizer), theirs, str(work / "their-quantised.gguf"), QUANT, threads],
        ],
    }
    seconds = {name: min(_timed(commands) for _ in range(3)) for name, commands in sides.items()}
    files = [{t.name: t for t in gguf.GGUFReader(path).tensors} for path in (work / "f16.gguf", Path(theirs))]
    same = [n for n, t in files[0].items() if n in files[1] and t.data.tobytes() == files[1][n].data.tobytes()]
    return {
        "gguf_identical_tensors": len(same),
        "gguf_tensors": len(files[1]),
        "export_time_ratio_vs_llama_cpp": seconds["ours"] / seconds["theirs"],
    }


def perplexity(run: LastRun, work: Path) -> dict[str, Any]:
    """Our perplexity over llama-perplexity's, of the newest f16 package on the same tokens of general text."""
    tool = PEERS / "build/bin/llama-perplexity"
    if not tool.is_file():
        raise Missing("llama.cpp's tools are not built: `make peers`")
    package = next((p for p in run.packages() if p.manifest.made_by["node"] == "teacher-gguf-f16"), None)
    if package is None:
        raise Missing("the run has no f16 package of the teacher")
    theirs = llama_perplexity(tool, package.file("model.gguf"))
    ours = own_perplexity(package.file("model.gguf"), ChatTokenizer.from_folder(run.model.path))
    return {"ppl_ratio_vs_llama_perplexity": ours / theirs, "ppl": ours}


def llama_perplexity(tool: Path, model: Path) -> float:
    """What llama-perplexity says about TEXT in chunks of WINDOW tokens."""
    command = [str(tool), "-m", str(model), "-f", str(TEXT), "-c", str(WINDOW), "-t", str(physical_cores())]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return float((said.stdout + said.stderr).split("Final estimate: PPL =")[1].split()[0])


def own_perplexity(model: Path, chat: ChatTokenizer) -> float:
    """The same by edgeft: of every whole chunk the tokens of its second half, each after all before it in the chunk."""
    ids = chat.encode_text(TEXT.read_text("utf-8"))
    chunks = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    at = range(WINDOW // 2, WINDOW - 1)
    session = LlamaCppSession(model, physical_cores(), WINDOW)
    nll = []
    for chunk, logits_PV in zip(chunks, session.score([(chunk, at) for chunk in chunks]), strict=True):
        next_ids = np.array([chunk[i + 1] for i in at], np.int32)
        nll.append(np.log(compare(logits_PV, logits_PV, next_ids).perplexity))
    session.close()
    return float(np.exp(np.mean(nll)))


def int4(run: LastRun, work: Path) -> dict[str, Any]:
    """Our int4 package against that of onnxruntime-genai's builder: KL from the torch model, and size."""
    ours = next((p for p in run.packages() if p.manifest.made_by["node"] == "teacher-onnx-int4"), None)
    if ours is None:
        raise Missing("the run has no int4 package of the teacher")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(run.model.path), "-o", str(work)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
    subprocess.run(command, check=True, capture_output=True)
    onnx.copy_files(run.model.path, work, onnx.MODEL_FILES)
    session = open_session(work, physical_cores(), context=max(map(len, run.probe.rows)))
    theirs = parity(session, run.probe)
    sizes = [sum(p.stat().st_size for p in folder.glob("model.onnx*")) for folder in (ours.path, work)]
    return {
        "int4_kl": ours.metrics["kl_mean"],
        "int4_kl_genai_builder": theirs.kl_mean,
        "int4_bytes_ratio": sizes[0] / sizes[1],
    }


def parity(session: Session, probe: Probe) -> Parity:
    """Agreement of a package with the probe's torch model, on the task's rows."""
    rows, positions = probe.rows[: probe.task_rows], probe.positions[: probe.task_rows]
    try:
        scored = np.concatenate(list(session.score(list(zip(rows, positions, strict=True)))))
    finally:
        session.close()
    return compare(probe.logits_PV[: len(scored)], scored, probe.next_ids()[: len(scored)])


def table(run: LastRun) -> str:
    """The run's packages: KL, agreement, size, speed; beside llama.cpp's published KL of a far larger model."""
    lines = [
        "| package | mean KL | p99 KL | top-1 | MB | bits per weight | tokens/s | published KL, Llama-3-8B |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for package in sorted(run.packages(), key=lambda a: str(a.manifest.made_by["node"])):
        m, tps = package.metrics, run.decode_tps(package)
        lines.append(
            f"| {package.manifest.made_by['node']} | {m['kl_mean']:.6f} | {m['kl_p99']:.5f} | {m['top1']:.2%} | "
            f"{m['bytes'] / 1e6:.0f} | {m['bits_per_weight']:.2f} | {'' if tps is None else f'{tps:.0f}'} | "
            f"{PUBLISHED.get(m['quant'], '') if m['format'] == 'gguf' else ''} |"
        )
    return "\n".join(lines)


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
    int4: ("int4_kl", "int4_kl_genai_builder", "int4_bytes_ratio"),
}
FIGURES = tuple(NAMES)

if __name__ == "__main__":
    main()
