"""Other forms of a finished ONNX package for targets that need them: aligned weights, fixed shapes, the ORT format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx

from edgeft.errors import ModelError
from edgeft.formats.onnx import GRAPH, WEIGHTS

STATIC, ORT = "model.static.onnx", "model.ort"
OPERATORS = "model.required_operators_and_types.config"  # what a reduced onnxruntime build must know
LARGE = 1 << 12  # bytes; smaller tensors are not worth a gap


def align_weights(package: Path, alignment: int) -> None:
    """Let every large tensor in the weights' file begin at a multiple of `alignment` bytes.

    So it can be mapped into memory as it lies in the file, whatever the pages of the target's system.
    """
    model = onnx.load(package / GRAPH, load_external_data=False)
    aligned = package / f"{WEIGHTS}.aligned"
    with (package / WEIGHTS).open("rb") as source, aligned.open("wb") as target:
        for tensor in model.graph.initializer:
            place = {entry.key: entry for entry in tensor.external_data}
            if "offset" not in place or "length" not in place:
                continue
            length = int(place["length"].value)
            if length >= LARGE:
                target.write(b"\0" * (-target.tell() % alignment))
            source.seek(int(place["offset"].value))
            place["offset"].value = str(target.tell())
            target.write(source.read(length))
    aligned.replace(package / WEIGHTS)
    onnx.save(model, package / GRAPH)


def write_static(package: Path, context: int) -> None:
    """Write the graph with all shapes fixed: one row, one token at a time, a cache of `context` tokens.

    It reads the same weights' file, so it costs next to nothing.
    """
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed  # brings torch along

    model = onnx.load(package / GRAPH, load_external_data=False)
    sizes = {"batch_size": 1, "sequence_length": 1, "past_sequence_length": context, "total_sequence_length": context}
    for name, size in sizes.items():
        make_dim_param_fixed(model.graph, name, size)
    if loose := sorted({d.dim_param for v in _ends(model) for d in v.type.tensor_type.shape.dim if d.dim_param}):
        raise ModelError(
            f"{package / GRAPH} has free dimensions that are not known here: {', '.join(loose)}",
            "leave out export.onnx_static",
        )
    onnx.save(model, package / STATIC)


def write_ort(package: Path) -> None:
    """Write the graph with its weights in onnxruntime's own format, and the list of operators it needs.

    Raises ModelError with the converter's last words.
    """
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(package / GRAPH)]
    command += ["--optimization_style", "Fixed", "--enable_type_reduction"]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (package / ORT).is_file() or not (package / OPERATORS).is_file():
        said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])[-400:]
        raise ModelError(
            f"onnxruntime cannot convert {package / GRAPH} (exit code {done.returncode}): {said}",
            "leave out export.onnx_ort",
        )


def _ends(model: onnx.ModelProto) -> list[Any]:
    return [*model.graph.input, *model.graph.output]
