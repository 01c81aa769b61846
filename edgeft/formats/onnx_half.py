"""The matrices of an fp32 ONNX graph stored in half precision: half the bytes, the same arithmetic.

onnxruntime computes in half precision on few processors, and the half-precision graph that onnxruntime-genai builds for
them predicts nonsense; so each matrix is turned into fp32 where it is read, which onnxruntime does once, when loading.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeft.errors import ModelError
from edgeft.formats.onnx import save_graph

SMALLEST = 1 << 12  # weights; smaller tensors (norms) stay as they are


def halve_graph(source: Path, out: Path) -> None:
    """Write the graph `source` as `out`. Raises ModelError if a weight is too large for half precision."""
    model = onnx.load(source)
    graph = model.graph
    halved, casts = [], []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < SMALLEST or len(tensor.dims) != 2:
            halved.append(tensor)
            continue
        weights = numpy_helper.to_array(tensor)
        if np.abs(weights).max() > np.finfo(np.float16).max:
            raise ModelError(f"{tensor.name} has values beyond fp16's range", "export as fp32 or int8")
        name = f"{tensor.name}_fp16"
        halved.append(numpy_helper.from_array(weights.astype(np.float16), name))
        casts.append(helper.make_node("Cast", [name], [tensor.name], f"{tensor.name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(halved)
    graph.node.extend(nodes)
    save_graph(model, out)
