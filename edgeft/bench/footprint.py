"""What a package costs to run, read from its tensor list: weights by type, bytes per token, cache per token.

`read_footprint` opens no runtime and loads no weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.bench.genai_config import GenaiConfig
from edgeft.errors import ArtifactError

BITS = {  # bits per weight of block types, scales included: ggml-common.h; a MatMulNBits block of 32 with float scales
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.5625, "q5_1": 6.0, "q5_0": 5.5, "q5_k": 5.5,
    "q4_1": 5.0, "q4_0": 4.5, "q4_k": 4.5, "iq4_nl": 4.5, "q3_k": 3.4375, "q2_k": 2.625,
}  # fmt: skip
CACHE_BYTES = {"gguf": 2, "onnx": 4, "hf": 4}  # llama.cpp keeps keys and values in f16, the others in float32
ONNX_WIDTHS = {1: 4, 10: 2, 16: 2, 2: 1, 3: 1}  # TensorProto.DataType: float, float16, bfloat16, uint8, int8


@dataclass(frozen=True)
class Footprint:
    """The matrices that make one token: `layers` and `head` are weights by type."""

    format: str  # gguf, onnx, or hf: a model folder that torch computes in float32
    layers: dict[str, int]
    head: dict[str, int]
    decode_bytes: int  # of weights, read once per generated token
    resident_bytes: int  # of all weights, the embedding included
    tied_head_bytes: int  # of the head, if it is the embedding too; 0 if it is a matrix of its own
    cache_bytes_per_token: int
    vocab: int
    width: int

    def figures(self) -> dict[str, int]:
        """What a result's row tells of it."""
        return {
            "weights_bytes": self.resident_bytes,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "read_bytes_per_token": self.decode_bytes,
        }

    @property
    def weights(self) -> dict[str, int]:
        """Weights that take part in one generated token, by type."""
        return dict(Counter(self.layers) + Counter(self.head))


def read_footprint(package: Path) -> Footprint:
    """The footprint of the package in folder `package`. Raises ArtifactError if it holds no model or a damaged one."""
    if (package / "model.gguf").is_file():
        return _gguf(package / "model.gguf")
    if (package / "model.onnx").is_file():
        return _onnx(package)
    if (package / "config.json").is_file():
        return _folder(package)
    raise ArtifactError(f"{package} holds neither model.gguf nor model.onnx", "name the folder of an exported package")


def _gguf(path: Path) -> Footprint:
    from edgeft.formats.gguf_reader import Reader

    try:
        reader = Reader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ArtifactError(f"{path}: not a readable GGUF file: {error}", "export the package again") from None
    architecture = _meta(reader, "general.architecture", path)
    matrices = [t for t in reader.tensors if len(t.shape) > 1]
    has_head = any(t.name == "output.weight" for t in matrices)
    head_name = "output.weight" if has_head else "token_embd.weight"  # tied: the embedding is the head
    layers, head, decode_bytes = Counter[str](), Counter[str](), 0
    vocab = tied_head_bytes = 0
    for tensor in matrices:
        kind = tensor.tensor_type.name.lower()
        if tensor.name == "token_embd.weight":
            vocab = int(tensor.shape[1])
            if has_head:
                continue
            tied_head_bytes = int(tensor.n_bytes)
        decode_bytes += int(tensor.n_bytes)
        (head if tensor.name == head_name else layers)[kind] += int(tensor.n_elements)
    width = int(_meta(reader, f"{architecture}.embedding_length", path))
    heads = int(_meta(reader, f"{architecture}.attention.head_count", path))
    kv_heads = _meta(reader, f"{architecture}.attention.head_count_kv", path, heads)
    blocks = int(_meta(reader, f"{architecture}.block_count", path))
    all_kv_heads = sum(map(int, kv_heads)) if isinstance(kv_heads, list) else int(kv_heads) * blocks
    key = int(_meta(reader, f"{architecture}.attention.key_length", path, width // heads))
    value = int(_meta(reader, f"{architecture}.attention.value_length", path, width // heads))
    return Footprint(
        format="gguf",
        layers=dict(layers),
        head=dict(head),
        decode_bytes=decode_bytes,
        resident_bytes=sum(int(t.n_bytes) for t in reader.tensors),
        tied_head_bytes=tied_head_bytes,
        cache_bytes_per_token=all_kv_heads * (key + value) * CACHE_BYTES["gguf"],
        vocab=vocab,
        width=width,
    )


def _meta(reader: Any, key: str, path: Path, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise ArtifactError(f"{path}: the file has no {key!r}", "export the package again")
    return default


def _onnx(package: Path) -> Footprint:
    """MatMulNBits and plain MatMul nodes with constant weights; the embedding is looked up, not multiplied."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(package / "model.onnx"), load_external_data=False).graph
    except (DecodeError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{package}: not a readable ONNX package: {error}", "export the package again") from None
    sizes = {t.name: (_count(t.dims), _count(t.dims) * ONNX_WIDTHS.get(t.data_type, 8)) for t in graph.initializer}
    kinds = {t.name: "f16" if ONNX_WIDTHS.get(t.data_type, 8) == 2 else "f32" for t in graph.initializer}
    resident_bytes = sum(size for _, size in sizes.values())
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in sizes:  # half precision is turned into float32 when it is loaded
            count = sizes[node.input[0]][0]
            resident_bytes += 4 * count - sizes[node.input[0]][1]
            sizes[node.output[0]], kinds[node.output[0]] = (count, 4 * count), "f32"
    layers, head, decode_bytes = Counter[str](), Counter[str](), 0
    for node in graph.node:
        constants = [name for name in node.input if name in sizes]
        if node.op_type not in ("MatMul", "Gemm", "MatMulNBits") or not constants:
            continue
        if node.op_type == "MatMulNBits":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            kind, count = f"int{attributes['bits']}", attributes["K"] * attributes["N"]
        else:
            kind, count = kinds[constants[0]], sizes[constants[0]][0]
        decode_bytes += sum(sizes[name][1] for name in constants)
        (head if "lm_head" in node.name else layers)[kind] += count
    config = GenaiConfig.of(package)
    per_layer = config.num_kv_heads * config.head_size * 2 * CACHE_BYTES["onnx"]
    return Footprint(
        format="onnx",
        layers=dict(layers),
        head=dict(head),
        decode_bytes=decode_bytes,
        resident_bytes=resident_bytes,
        tied_head_bytes=0,  # a tied embedding is a tensor of its own here
        cache_bytes_per_token=config.num_layers * per_layer,
        vocab=config.vocab_size,
        width=config.hidden_size,
    )


def _folder(folder: Path) -> Footprint:
    from edgeft.formats.hf import read_config
    from edgeft.formats.weights import open_weights

    config = read_config(folder)
    config = config.get("text_config", config)
    with open_weights(folder) as weights:
        sizes = {name: _count(shape) for name, shape in weights.shapes.items() if len(shape) == 2}
        resident = 4 * sum(_count(shape) for shape in weights.shapes.values())
    table = next(name for name in sizes if name.endswith("embed_tokens.weight"))
    head = next((name for name in sizes if name.endswith("lm_head.weight")), table)
    layers = sum(size for name, size in sizes.items() if name not in (table, head))
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    per_layer = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or width // heads)
    return Footprint(
        format="hf",
        layers={"f32": layers},
        head={"f32": sizes[head]},
        decode_bytes=4 * (layers + sizes[head]),
        resident_bytes=resident,
        tied_head_bytes=4 * sizes[head] if head == table else 0,
        cache_bytes_per_token=int(config["num_hidden_layers"]) * per_layer * 2 * CACHE_BYTES["hf"],
        vocab=sizes[table] // width,
        width=width,
    )


def _count(dims: Any) -> int:
    total = 1
    for size in dims:
        total *= int(size)
    return total
