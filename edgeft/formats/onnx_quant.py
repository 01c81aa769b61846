"""Weights of an fp32 ONNX graph cut to 8 or 4 bits, as onnxruntime's MatMulNBits and GatherBlockQuantized read them.

Letters: N outputs, K inputs of a matrix, B blocks of its row, C = 32 weights of a block. A weight is
(q - zero) * scale, with one scale and one integer zero point per block.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeft.errors import ModelError

Floats = NDArray[np.float32]
BLOCK = 32
ZERO_8 = 128  # the code of 0 where there are no zero points
TINY = np.float32(1e-10)
CHUNK = 4096  # blocks searched together: they stay in the processor's cache
SHRINK = (1.05, 1.0, 0.95, 0.9)  # tried ends of a block's range, as shares of its largest and smallest weight
EMBEDDING_BITS = 8  # of the embedding and the head, which small bit widths hurt most
ACCURACY_LEVEL = 4  # MatMulNBits: activations as int8, the fast kernels


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix."""

    q_NBC: NDArray[np.uint8]
    scale_NB: Floats
    zero_NB: NDArray[np.uint8]
    bits: int

    def weights(self) -> Floats:
        """The matrix [N, K] that the runtime computes with."""
        zero = self.zero_NB.astype(np.float32)[..., None]
        w_NBC: Floats = (self.q_NBC - zero) * self.scale_NB[..., None]
        return w_NBC.reshape(len(w_NBC), -1)


def quantize_matrix(w_NK: Floats, bits: int) -> Blocks:
    """Quantise in blocks of 32 along K: 8 bits symmetrically, 4 bits by a search for the least squared error.

    With 8 bits the rounding of the activations decides, and zero points only cost time (measured).

    Raises ModelError if K is no multiple of 32.
    """
    num_rows, width = w_NK.shape
    if width % BLOCK:
        raise ModelError(f"a matrix of width {width} cannot be cut into blocks of {BLOCK}", "export this model as fp32")
    w = np.ascontiguousarray(w_NK, np.float32).reshape(-1, BLOCK)
    q, scale, zero = np.empty(w.shape, np.uint8), np.empty(len(w), np.float32), np.empty(len(w), np.uint8)
    for at in range(0, len(w), CHUNK):
        part = slice(at, at + CHUNK)
        q[part], scale[part], zero[part] = _search(w[part]) if bits == 4 else _symmetric(w[part])
    shape = (num_rows, width // BLOCK)
    return Blocks(q.reshape(*shape, BLOCK), scale.reshape(shape), zero.reshape(shape), bits)


def _symmetric(w: Floats) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """8-bit codes, scale and zero point (128) of every row of `w`."""
    scale: Floats = np.maximum(np.abs(w).max(1), TINY) / np.float32(127)
    zero = np.full(len(w), ZERO_8, np.float32)
    return _codes(w, scale, zero, 255).astype(np.uint8), scale, zero.astype(np.uint8)


def _search(w: Floats) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """4-bit codes, scale and zero point of every row of `w`: the best of all tried ranges, each with its best scale.

    For given d = q - zero the scale of least squared error is <w,d>/<d,d>, and it leaves |w|^2 - <w,d>^2/<d,d>.
    """
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    best_gain = np.full(len(w), -1.0, np.float32)
    scale, zero = np.ones(len(w), np.float32), np.zeros(len(w), np.float32)
    for a, b in product(SHRINK, SHRINK):
        step = np.maximum((high * b - low * a) / np.float32(15), TINY)
        at = np.clip(np.rint(-low * a / step), 0, 15)
        d = _codes(w, step, at, 15) - at[:, None]
        wd, dd = np.einsum("nc,nc->n", w, d), np.maximum(np.einsum("nc,nc->n", d, d), TINY)
        gain = wd * wd / dd
        better = gain > best_gain
        best_gain[better], zero[better] = gain[better], at[better]
        scale[better] = np.where(wd > 0, wd / dd, step)[better]
    return _codes(w, scale, zero, 15).astype(np.uint8), scale, zero.astype(np.uint8)


def _codes(w: Floats, step: Floats, zero: Floats, top: int) -> Floats:
    codes: Floats = w * (np.float32(1) / step)[:, None]
    codes += zero[:, None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    return codes


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes along the last axis as the operators store them: two of 4 bits per byte, the lower half first."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def quantize_graph(source: Path, out: Path, bits: int) -> None:
    """Write the graph `source` as `out` with `bits` per weight; embedding and head keep 8.

    Where the graph ties the two, they go on sharing their bytes.
    """
    model = onnx.load(source)
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    transposed = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    head = next(n for n in graph.node if "logits" in n.output)
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, list[onnx.TensorProto]] = {}  # weight -> its quantised tensors
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.input[1]
            tensor_bits = EMBEDDING_BITS if node is head else bits
            if name not in stored:
                blocks = quantize_matrix(numpy_helper.to_array(weights[name]).T, tensor_bits)
                stored[name] = list(_tensors(name, blocks))
            nodes.append(_matmul(node, [t.name for t in stored[name]], tensor_bits, weights[name].dims))
        elif node.op_type == "Gather" and node.input[1] == "input_ids":
            tied = transposed.get(node.input[0])
            name = tied.input[0] if tied else node.input[0]
            if name not in stored:
                table = numpy_helper.to_array(weights[name])
                stored[name] = list(_tensors(name, quantize_matrix(table.T if tied else table, EMBEDDING_BITS)))
            nodes += _gather(node, [t.name for t in stored[name]])
        else:
            nodes.append(node)
    if head.op_type != "MatMul" or head.input[1] not in stored:
        raise ModelError(
            f"{source} is no graph of onnxruntime-genai's builder in fp32", "export the model as fp32 first"
        )
    _replace(graph, nodes, stored)
    _save(model, out)


def _tensors(name: str, blocks: Blocks) -> Iterator[onnx.TensorProto]:
    yield numpy_helper.from_array(pack(blocks.q_NBC, blocks.bits), f"{name}_q{blocks.bits}")
    yield numpy_helper.from_array(blocks.scale_NB, f"{name}_scale")
    if blocks.bits == 4:  # with 8 bits the operators take 128
        yield numpy_helper.from_array(pack(blocks.zero_NB, 4), f"{name}_zero")


def _matmul(node: onnx.NodeProto, tensors: list[str], bits: int, dims: list[int]) -> onnx.NodeProto:
    attributes: dict[str, Any] = {
        "K": dims[0],
        "N": dims[1],
        "bits": bits,
        "block_size": BLOCK,
        "accuracy_level": ACCURACY_LEVEL,
    }
    inputs = [node.input[0], *tensors]
    return helper.make_node("MatMulNBits", inputs, node.output, node.name, domain="com.microsoft", **attributes)


def _gather(node: onnx.NodeProto, tensors: list[str]) -> list[onnx.NodeProto]:
    """Rows of the embedding from the codes as MatMulNBits holds them, [V, B, C], so that no second copy is needed."""
    codes, scale = tensors
    last = f"{node.name}/last_axis"
    rows = f"{node.name}/rows"
    attributes: dict[str, Any] = {"bits": EMBEDDING_BITS, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2}
    return [
        helper.make_node("Constant", [], [last], last, value=numpy_helper.from_array(np.array([2], np.int64))),
        helper.make_node("Unsqueeze", [scale, last], [f"{scale}/column"], f"{node.name}/scale"),
        helper.make_node(
            "GatherBlockQuantized",
            [codes, node.input[1], f"{scale}/column"],
            [rows],
            node.name,
            domain="com.microsoft",
            **attributes,
        ),
        helper.make_node(
            "Constant", [], [f"{rows}/shape"], f"{rows}/shape", value=numpy_helper.from_array(np.array([0, 0, -1]))
        ),
        helper.make_node("Reshape", [rows, f"{rows}/shape"], node.output, f"{node.name}/flat"),
    ]


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


def _save(model: onnx.ModelProto, out: Path) -> None:
    location = f"{out.name}.data"
    (out.parent / location).unlink(missing_ok=True)  # onnx would append to it
    onnx.save(model, out, save_as_external_data=True, all_tensors_to_one_file=True, location=location)
