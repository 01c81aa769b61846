"""What one generated token costs a package: the bytes of weights that are read, and the multiplications done with them.

Read from the tensor list, not from the file's size: of an embedding one row is read, of a tied one all of it, because
it is the output head too. Keys and values are not weights and are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import ArtifactError

GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"
# Inputs of which a token needs one row: (operator, first input that is such a table).
ROW_READERS = {"Gather": 0, "GatherBlockQuantized": 0, "GroupQueryAttention": 7, "RotaryEmbedding": 2}
PASSES_ON = {"Transpose", "Unsqueeze", "Reshape", "Identity"}  # give the table to another operator, unread
PRODUCTS = {"MatMul", "Gemm", "MatMulNBits", "MatMulInteger"}


@dataclass(frozen=True)
class Cost:
    """Per generated token. `head_macs` is the output head's share of `macs`: a prompt needs it for its last token."""

    read_bytes: int
    macs: int
    head_macs: int


def bytes_per_token(package: Path) -> int:
    """Bytes of weights that the package in folder `package` reads for each generated token."""
    return cost_of(package).read_bytes


def cost_of(package: Path) -> Cost:
    """The cost of a token. Raises ArtifactError if the folder holds no package."""
    if (package / "model.gguf").is_file():
        return _gguf_cost(package / "model.gguf")
    if (package / "model.onnx").is_file():
        return _onnx_cost(package / "model.onnx")
    raise ArtifactError(f"{package} holds neither model.gguf nor model.onnx", "name the folder of an exported package")


def _gguf_cost(path: Path) -> Cost:
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tied = GGUF_HEAD not in tensors
    read, macs, head = 0, 0, 0
    for name, tensor in tensors.items():
        size, elements = int(tensor.n_bytes), int(tensor.n_elements)
        if name == GGUF_EMBEDDING and not tied:
            read += size // int(tensor.shape[-1])
            continue
        read += size
        if len(tensor.shape) > 1:
            macs += elements
        if name in (GGUF_HEAD, GGUF_EMBEDDING):
            head = elements
    return Cost(read, macs, head)


def _onnx_cost(path: Path) -> Cost:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    whole: set[str] = set()  # read in full
    rows: set[str] = set()
    macs: dict[str, int] = {}
    for node in graph.node:
        for number, name in enumerate(node.input):
            if name not in weights or node.op_type in PASSES_ON:
                continue
            by_row = number == 0 if node.op_type.startswith("Gather") else number >= ROW_READERS.get(node.op_type, 99)
            (rows if by_row else whole).add(name)
        products = [name for name in node.input[1:2] if node.op_type in PRODUCTS and name in weights]
        macs |= {name: _product_size(node, weights[name]) for name in products}
    read = sum(_size(weights[name]) for name in whole)
    read += sum(_size(weights[name]) // max(1, weights[name].dims[0]) for name in rows - whole)
    outputs = {name for node in graph.node if "logits" in node.output for name in node.input}
    return Cost(read, sum(macs.values()), sum(count for name, count in macs.items() if name in outputs))


def _product_size(node: Any, weight: Any) -> int:
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "MatMulNBits":
        return int(attributes["K"] * attributes["N"])
    return int(math.prod(weight.dims))


def _size(tensor: Any) -> int:
    """Bytes of an initialiser, also of one whose values lie in another file."""
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    if tensor.raw_data:
        return len(tensor.raw_data)
    import onnx

    width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return int(math.prod(tensor.dims)) * width
