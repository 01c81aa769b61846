"""The weights of an fp32 ONNX graph cut to 8 or 4 bits, in operators that every onnxruntime has.

The embedding is read by standard operators from the tensors of the head's MatMulNBits: GatherBlockQuantized, which
would do the same, is missing in browsers. Letters: V vocabulary; N, K, B, C as in `onnx_blocks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeft.errors import ModelError
from edgeft.formats.onnx import save_graph
from edgeft.formats.onnx_blocks import Blocks, Floats, Scheme, pack, quantize_matrix

HEAD = Scheme(8)  # of the embedding and the head, which small bit widths hurt most
ACCURACY_LEVEL = 4  # MatMulNBits: activations as int8, the fast kernels
MATRIX = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.MatMul\.weight")
ONE_OF = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}  # matrices joined because they have the same input
BLOCKS = {"attn": "self_attn", "mlp": "mlp"}


def quantize_graph(
    source: Path, out: Path, scheme: Scheme, importance: Mapping[str, Floats] | None = None, head: Scheme = HEAD
) -> None:
    """Write the graph `source` as `out` with its matrices in `scheme`, embedding and head in `head`.

    `importance` maps the model's names of linear layers (`model.layers.0.mlp.up_proj.weight`) to the mean square of
    each of their inputs. Where the graph ties embedding and head, they go on sharing their bytes.
    Raises ModelError if the graph is not one of onnxruntime-genai's builder in fp32, or an importance is missing.
    """
    model = onnx.load(source)
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    transposed = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    last = next(n for n in graph.node if "logits" in n.output)
    if last.op_type != "MatMul" or last.input[1] not in weights:
        raise ModelError(
            f"{source} is no graph of onnxruntime-genai's builder in fp32", "export the model as fp32 first"
        )
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, list[onnx.TensorProto]] = {}  # weight -> its quantised tensors
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.input[1]
            own = head if node is last else scheme
            if name not in stored:
                matters = importance_of(name, importance) if importance is not None and node is not last else None
                w_KN = numpy_helper.to_array(weights[name])
                stored[name] = list(_tensors(name, quantize_matrix(w_KN.T, own, matters)))
            nodes.append(_matmul(node, [t.name for t in stored[name]], own, weights[name].dims))
        elif node.op_type == "Gather" and node.input[1] == "input_ids":
            tied = transposed.get(node.input[0])
            name = tied.input[0] if tied else node.input[0]
            if name not in stored:
                table = numpy_helper.to_array(weights[name])
                stored[name] = list(_tensors(name, quantize_matrix(table.T if tied else table, head)))
            nodes += _embedding(node, [t.name for t in stored[name]], head)
        else:
            nodes.append(node)
    _replace(graph, nodes, stored)
    save_graph(model, out)


def importance_of(weight: str, importance: Mapping[str, Floats]) -> Floats:
    """Importance of the inputs of the graph's matrix `weight`. Raises ModelError if it is not there."""
    match = MATRIX.fullmatch(weight)
    name = weight
    if match:
        layer, block, matrix = match.groups()
        name = f"model.layers.{layer}.{BLOCKS[block]}.{ONE_OF.get(matrix, matrix)}.weight"
    if name not in importance:
        raise ModelError(
            f"the importance of inputs says nothing about {name}", "compute it with the model that is exported"
        )
    return importance[name]


def _tensors(name: str, blocks: Blocks) -> Iterator[onnx.TensorProto]:
    bits = blocks.scheme.bits
    yield numpy_helper.from_array(pack(blocks.q_NBC, bits), f"{name}_q{bits}")
    yield numpy_helper.from_array(blocks.scale_NB, f"{name}_scale")
    if blocks.zero_NB is not None:  # otherwise the operator takes the middle
        yield numpy_helper.from_array(pack(blocks.zero_NB, bits), f"{name}_zero")


def _matmul(node: onnx.NodeProto, tensors: list[str], scheme: Scheme, dims: list[int]) -> onnx.NodeProto:
    attributes: dict[str, Any] = {
        "K": dims[0],
        "N": dims[1],
        "bits": scheme.bits,
        "block_size": scheme.block,
        "accuracy_level": ACCURACY_LEVEL,
    }
    inputs = [node.input[0], *tensors]
    return helper.make_node("MatMulNBits", inputs, node.output, node.name, domain="com.microsoft", **attributes)


def _embedding(node: onnx.NodeProto, tensors: list[str], scheme: Scheme) -> list[onnx.NodeProto]:
    """(q - middle) * scale for the rows of `input_ids`, from q [V, B, C] and scale [V, B] as MatMulNBits holds them."""
    codes, scale = tensors
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(output: str, value: Any, dtype: Any) -> str:
        return add("Constant", [], output, value=numpy_helper.from_array(np.array(value, dtype)))

    base, ids = node.name, node.input[1]
    flat = constant(f"{base}/flat", [0, 0, -1], np.int64)
    column = constant(f"{base}/column", [-1], np.int64)
    middle = constant(f"{base}/middle", scheme.middle, np.float32)
    q = add("Gather", [codes, ids], f"{base}/codes")
    s = add("Unsqueeze", [add("Gather", [scale, ids], f"{base}/scales"), column], f"{base}/scales_column")
    d = add("Sub", [add("Cast", [q], f"{base}/float", to=TensorProto.FLOAT), middle], f"{base}/centred")
    add("Reshape", [add("Mul", [d, s], f"{base}/blocks"), flat], node.output[0])
    return nodes


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], stored: dict[str, list[onnx.TensorProto]]) -> None:
    """Put in the new nodes and tensors; what nothing reads any more is left out."""
    read = {name for node in nodes for name in node.input} | {o.name for o in graph.output}
    kept = [n for n in nodes if n.op_type != "Transpose" or n.output[0] in read]
    used = {name for node in kept for name in node.input}
    initializers = [i for i in graph.initializer if i.name in used]
    initializers += [tensor for tensors in stored.values() for tensor in tensors]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(initializers)
