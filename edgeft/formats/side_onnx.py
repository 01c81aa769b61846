"""An ONNX package as one side of a comparison: weights by the nodes that read them, settings as the graph has them.

Letters: N outputs, K inputs of a matrix, B blocks of its row. Nodes are named as onnxruntime-genai's builder does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeft.errors import ModelError
from edgeft.formats.hf import read_config
from edgeft.formats.sides import EMBEDDING, HEAD, LAST_NORM, Floats, Side, Tensor, config_facts, tokenizer_facts

PART = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/(?:MatMul|Add)")
NORM = re.compile(r"model\.layers\.(\d+)\.(?:(\w+layernorm)|attn\.([qk]_norm)\.layernorm)\.weight")
PARTS = ("q_proj", "k_proj", "v_proj")
CODES, SCALES = "_q8", "_scale"  # how our own quantised graphs call the two parts of a table
Read = Callable[[], Floats]


def onnx_side(path: Path) -> Side:
    """Raises ModelError if the graph cannot be read."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own class of error is private
        raise ModelError(f"{path}: not a readable ONNX graph: {error}", "export the package again") from None
    stored = {i.name: i for i in graph.initializer}
    stored |= {n.output[0]: stored[n.input[0]] for n in graph.node if n.op_type == "Cast" and n.input[0] in stored}
    folder, config = path.parent, read_config(path.parent)
    facts = {**config_facts(config), **tokenizer_facts(folder), **_facts(graph, stored, config, folder)}
    above_one = str(config.get("model_type")).startswith("gemma")  # its norms are stored as what they add to 1
    tensors = dict(_tensors(graph, stored, facts, folder, above_one))
    if EMBEDDING in tensors and (table := _embedding_rows(graph)):
        facts["vocabulary rows"] = table
    return Side(path, "onnx", facts, tensors, folder)


def _tensors(graph: Any, stored: dict[str, Any], facts: dict[str, Any], folder: Path, above_one: bool) -> Any:
    transposed = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulNBits") and len(node.input) > 1 and node.input[1] in stored:
            tensor = _matrix(node, stored, folder)
            if found := PART.fullmatch(node.name):
                yield from _of_part(found, "weight", tensor, facts)
            elif "logits" in node.output:
                yield HEAD, tensor
        elif node.op_type == "Add" and (found := PART.fullmatch(node.name)):
            for bias in (stored[name] for name in node.input if name in stored):
                yield from _of_part(found, "bias", Tensor(_kind(bias), _plain(bias, folder, False)), facts)
        elif "Gather" in node.op_type and node.input[1] == "input_ids":
            name = transposed.get(node.input[0], node.input[0])
            if name.endswith(CODES):
                yield EMBEDDING, _table_of_codes(name, stored, folder)
            elif node.op_type == "Gather" and not name.endswith(SCALES):
                yield EMBEDDING, Tensor(_kind(stored[name]), _plain(stored[name], folder, name != node.input[0]))
            elif node.op_type != "Gather":
                yield EMBEDDING, _quantised_table(node, stored, folder)
    for name, tensor in stored.items():
        if (found := NORM.fullmatch(name)) and found[2] == "final_norm_layernorm":
            yield LAST_NORM, Tensor(_kind(tensor), _norm(tensor, folder, above_one))
        elif found:
            inner = f"self_attn.{found[3]}" if found[3] else found[2]
            yield f"model.layers.{found[1]}.{inner}.weight", Tensor(_kind(tensor), _norm(tensor, folder, above_one))


def _of_part(found: re.Match[str], kind: str, tensor: Tensor, facts: dict[str, Any]) -> Any:
    """The weight or bias of a product in a layer, in Hugging Face's names."""
    layer, block, part = found.groups()
    if part == "qkv_proj":
        yield from _split(layer, kind, tensor, facts)
    else:
        yield f"model.layers.{layer}.{'self_attn' if block == 'attn' else 'mlp'}.{part}.{kind}", tensor


def _matrix(node: Any, stored: dict[str, Any], folder: Path) -> Tensor:
    """The weight [N, K] of a product."""
    if node.op_type == "MatMul":
        return Tensor(_kind(stored[node.input[1]]), _plain(stored[node.input[1]], folder, True))
    inputs = [_values(stored.get(name), folder) for name in node.input[1:4]]
    bits, size, width = (int(_attribute(node, name)) for name in ("bits", "block_size", "K"))
    return Tensor(f"int{bits}", lambda: _dequantized(inputs, bits, size, width))


def _table_of_codes(name: str, stored: dict[str, Any], folder: Path) -> Tensor:
    """An embedding whose rows our own graphs look up as codes [V, B, C] and scales [V, B], shared with the head."""
    inputs = [_values(stored[n], folder) for n in (name, name.removesuffix(CODES) + SCALES)]
    return Tensor("int8", lambda: _dequantized(inputs, 8, stored[name].dims[2], None))


def _quantised_table(node: Any, stored: dict[str, Any], folder: Path) -> Tensor:
    """An embedding as onnxruntime-genai's builder quantises it."""
    inputs = [_values(stored.get(node.input[at]), folder) for at in (0, *range(2, len(node.input)))]
    bits, size = int(_attribute(node, "bits", 4)), int(_attribute(node, "block_size", 128))
    return Tensor(f"int{bits}", lambda: _dequantized(inputs, bits, size, None))


def _dequantized(inputs: list[Callable[[], NDArray[Any]] | None], bits: int, size: int, width: int | None) -> Floats:
    """(code - zero) * scale by blocks; codes of less than 8 bits stand several to a byte, the lowest bits first."""
    codes, scale = (read() for read in inputs[:2] if read)
    codes = _unpacked(codes.reshape(len(codes), -1), bits)
    num_blocks = codes.shape[1] // size
    scale_NB = scale.astype(np.float32).reshape(len(codes), num_blocks)
    zero_NB: Any = np.float32(1 << (bits - 1))
    if len(inputs) > 2 and inputs[2]:
        zeros = inputs[2]()
        if zeros.dtype == np.uint8:
            zeros = _unpacked(zeros.reshape(len(codes), -1), bits)[:, :num_blocks]
        zero_NB = zeros.astype(np.float32).reshape(len(codes), num_blocks)[..., None]
    values: Floats = (codes.reshape(len(codes), num_blocks, size) - zero_NB) * scale_NB[..., None]
    return values.reshape(len(codes), -1)[:, :width].astype(np.float32, copy=False)


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(packed), -1)


def _split(layer: str, kind: str, tensor: Tensor, facts: dict[str, Any]) -> Any:
    """Queries, keys and values, which the graph multiplies at once."""
    heads, kv_heads = int(facts["heads"]), int(facts["key-value heads"])

    def part(number: int) -> Read:
        def read() -> Floats:
            whole = tensor.read()
            size = len(whole) // (heads + 2 * kv_heads)
            ends = np.cumsum([heads * size, kv_heads * size])
            return np.asarray(np.split(whole, ends)[number])

        return read

    for number, name in enumerate(PARTS):
        yield f"model.layers.{layer}.self_attn.{name}.{kind}", Tensor(tensor.kind, part(number))


def _values(tensor: Any, folder: Path) -> Callable[[], NDArray[Any]] | None:
    return None if tensor is None else lambda: numpy_helper.to_array(tensor, str(folder))


def _plain(tensor: Any, folder: Path, transpose: bool) -> Read:
    def read() -> Floats:
        values = numpy_helper.to_array(tensor, str(folder)).astype(np.float32, copy=False)
        return values.T if transpose else values

    return read


def _norm(tensor: Any, folder: Path, above_one: bool) -> Read:
    read = _plain(tensor, folder, False)
    return (lambda: read() - 1) if above_one else read


def _kind(tensor: Any) -> str:
    name: str = onnx.TensorProto.DataType.Name(tensor.data_type)
    return {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}.get(name, name)


def _attribute(node: Any, name: str, default: Any = None) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _embedding_rows(graph: Any) -> int:
    logits = next(o for o in graph.output if o.name == "logits")
    return int(logits.type.tensor_type.shape.dim[2].dim_value)


def _facts(graph: Any, stored: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the graph itself computes with, whatever the files beside it say."""
    facts: dict[str, Any] = {}
    for node in graph.node:
        if "SimplifiedLayerNormalization" in node.op_type:
            facts["norm epsilon"] = float(_attribute(node, "epsilon"))
        if node.op_type == "GroupQueryAttention":
            facts["heads"] = int(_attribute(node, "num_heads"))
            facts["key-value heads"] = int(_attribute(node, "kv_num_heads"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "cos_cache" in stored and "sin_cache" in stored and rope.get("rope_type", "default") == "default":
        cos, sin = (numpy_helper.to_array(stored[f"{name}_cache"], str(folder))[1] for name in ("cos", "sin"))
        middle = len(cos) // 2  # turns by theta^(-middle / len) from one position to the next
        facts["rope theta"] = float(np.arctan2(float(sin[middle]), float(cos[middle])) ** (-len(cos) / middle))
    return facts
