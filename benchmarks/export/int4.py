"""int4 ONNX packages of one model: edgeft's with and without importance, and onnxruntime-genai's own.

Prints bytes of graph and weights, and the mean KL on every probe; the last line is one JSON object. Neither depends on
how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from edgeft.bench.host import physical_cores
from edgeft.bench.session import open_session
from edgeft.formats.onnx import MODEL_FILES, copy_companions, copy_files
from edgeft.formats.onnx_blocks import Scheme
from edgeft.formats.onnx_quant import quantize_graph
from edgeft.formats.parity import compare
from edgeft.formats.probe import Probe

OWN = {
    "edgeft, plain": (Scheme(4, 32, True), False),
    "edgeft": (Scheme(4, 32, True), True),
    "edgeft, no zero points": (Scheme(4, 32), True),
    "edgeft, blocks of 64": (Scheme(4, 64, True), True),
    "edgeft, blocks of 16, no zero points": (Scheme(4, 16), True),
}
BUILDER = {
    "genai default": (),
    "genai k_quant": ("algo_config=k_quant",),
    "genai k_quant_mixed": ("algo_config=k_quant_mixed",),
}


def packages(model: Path, full: Path, importance: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Each package, made when it is asked for; the one before is overwritten."""
    inputs = load_file(importance)
    for name, options in BUILDER.items():
        out = folder / name.replace(" ", "-")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(folder / "cache")]
        command += ["--extra_options", *options] if options else []
        subprocess.run(command, check=True, capture_output=True)
        copy_files(model, out, MODEL_FILES)
        yield name, out
    out = folder / "own"
    out.mkdir()
    copy_companions(full, out)
    for name, (scheme, weighted) in OWN.items():
        quantize_graph(full / "model.onnx", out / "model.onnx", scheme, inputs if weighted else None)
        yield name, out


def mean_kl(package: Path, probe: Probe) -> float:
    """Mean KL from the torch model over all positions of a probe."""
    session = open_session(package, physical_cores(), context=max(map(len, probe.rows)))
    scored = list(session.score(list(zip(probe.rows, probe.positions, strict=True))))
    session.close()
    return compare(probe.logits_PV, np.concatenate(scored), probe.next_ids()).kl_mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("full", type=Path, help="its fp32 ONNX package")
    parser.add_argument("importance", type=Path, help="importance.safetensors: mean squares by input")
    parser.add_argument("probe", type=Path, nargs="+", help="probe artifacts of the model")
    given = parser.parse_args()
    probes = [Probe.load(folder) for folder in given.probe]
    found: dict[str, tuple[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, package in packages(given.model, given.full, given.importance, Path(folder)):
            size = sum(path.stat().st_size for path in package.glob("model.onnx*"))
            found[name] = size, [mean_kl(package, probe) for probe in probes]
            print(f"{name:38s} {size / 1e6:6.1f} MB", *(f"KL {kl:.5f}" for kl in found[name][1]), flush=True)
    own, other = found["edgeft"], found["genai k_quant_mixed"]
    ratio = own[0] / other[0]
    print(json.dumps({"int4_kl": own[1], "int4_kl_genai_builder": other[1], "int4_bytes_ratio": ratio}))


if __name__ == "__main__":
    main()
