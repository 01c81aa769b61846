"""Published models as footprints: the tensor types that llama.cpp's quantiser gives each of their matrices.

Sizes are from the models' config.json. The rule follows llama_tensor_get_type in llama.cpp's src/llama-quant.cpp for
files made without an importance matrix; the sums agree with the repacked buffers that llama.cpp reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from edgeft.bench.footprint import BITS, CACHE_BYTES, Footprint

BASE = {
    "q2_k": "q2_k", "q3_k_m": "q3_k", "q4_0": "q4_0", "q4_k_m": "q4_k", "q5_k_m": "q5_k", "q6_k": "q6_k",
    "q8_0": "q8_0", "f16": "f16",
}  # fmt: skip
ODD_ROWS = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # not n x 256 long
FUSED_QKV = {"q3_k_m": "q4_k", "q4_k_m": "q5_k", "q5_k_m": "q6_k"}


@dataclass(frozen=True)
class Dims:
    """A dense decoder. `conv_layers` have short convolutions (two projections) in place of attention."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    fused_qkv: bool = False
    gated: bool = True
    conv_layers: int = 0


MODELS = {
    "qwen2.5-1.5b": Dims(28, 1536, 8960, 12, 2, 128, 151936),
    "deepseek-r1-distill-qwen-1.5b": Dims(28, 1536, 8960, 12, 2, 128, 151936),
    "qwen3-1.7b": Dims(28, 2048, 6144, 16, 8, 128, 151936),
    "smollm2-1.7b": Dims(24, 2048, 8192, 32, 32, 64, 49152),
    "gemma-3-1b": Dims(26, 1152, 6912, 4, 1, 256, 262144),
    "phi-3.5-mini": Dims(32, 3072, 8192, 32, 32, 96, 32064, fused_qkv=True),
    "phi-4-mini": Dims(32, 3072, 8192, 24, 8, 128, 200064, fused_qkv=True),
    "lfm2.5-1.2b-instruct": Dims(16, 2048, 8192, 32, 8, 64, 65536, conv_layers=10),
    "llama-3.2-1b": Dims(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3.2-3b": Dims(28, 3072, 8192, 24, 8, 128, 128256),
    "llama-3.1-8b": Dims(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-2-13b": Dims(40, 5120, 13824, 40, 40, 128, 32000),
    "tinyllama-1.1b": Dims(22, 2048, 5632, 32, 4, 64, 32000),
    "qwen1.5-1.8b": Dims(24, 2048, 5504, 16, 16, 128, 151936),
}


def footprint_of(model: str, quant: str, head_type: str | None = None) -> Footprint:
    """The footprint of a published file; `head_type` is given for one that llama.cpp's quantiser has not made.

    Raises KeyError for a model or type that is not listed here.
    """
    dims = MODELS[model]
    layers = Counter[str]()
    for name, layer, rows, columns in _matrices(dims):
        layers[_type_of(quant, name, layer, columns, dims)] += rows * columns
    head_type = head_type or _fitting("f16" if quant == "f16" else "q8_0" if quant == "q8_0" else "q6_k", dims.width)
    head = {head_type: dims.width * dims.vocab}
    attention_layers = dims.layers - dims.conv_layers
    return Footprint(
        format="gguf",
        layers=dict(layers),
        head=head,
        decode_bytes=_bytes(layers) + _bytes(head),
        resident_bytes=_bytes(layers) + _bytes(head),
        tied_head_bytes=0,  # not needed for speed
        cache_bytes_per_token=attention_layers * dims.kv_heads * dims.head_dim * 2 * CACHE_BYTES["gguf"],
        vocab=dims.vocab,
        width=dims.width,
    )


def _matrices(d: Dims) -> Iterator[tuple[str, int, int, int]]:
    """(kind, layer, rows, columns) of every matrix in the layers; a row is what one block type divides."""
    inner_q, inner_kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    for layer in range(d.layers):
        if layer < d.conv_layers:  # which layers they are makes no difference to the sums
            yield "conv", layer, 3 * d.width, d.width
            yield "conv", layer, d.width, d.width
        elif d.fused_qkv:
            yield "qkv", layer, inner_q + 2 * inner_kv, d.width
            yield "o", layer, d.width, inner_q
        else:
            yield "qk", layer, inner_q + inner_kv, d.width
            yield "v", layer, inner_kv, d.width
            yield "o", layer, d.width, inner_q
        yield "up", layer, (2 if d.gated else 1) * d.inner, d.width
        yield "down", layer, d.width, d.inner


def _type_of(quant: str, name: str, layer: int, columns: int, d: Dims) -> str:
    kind = BASE[quant]
    raised = _more_bits(layer, d.layers)
    if name == "qkv":
        kind = FUSED_QKV.get(quant, kind)
    elif name == "v" and quant == "q2_k":
        kind = "q4_k" if d.heads // d.kv_heads >= 4 else "q3_k"
    elif name == "v" and quant == "q3_k_m":
        kind = "q5_k" if layer < 2 else "q4_k"
    elif name == "down" and quant == "q3_k_m":
        kind = "q5_k" if layer < d.layers // 16 else "q4_k" if raised else "q3_k"
    elif name in ("v", "down") and quant in ("q4_k_m", "q5_k_m") and raised:
        kind = "q6_k"
    elif name in ("o", "down") and quant == "q2_k":
        kind = "q3_k"
    elif name == "o" and quant == "q3_k_m":
        kind = "q4_k"
    return _fitting(kind, columns)


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitting(kind: str, columns: int) -> str:
    return ODD_ROWS.get(kind, kind) if columns % 256 else kind


def _bytes(weights: dict[str, int]) -> int:
    return round(sum(count * BITS[kind] / 8 for kind, count in weights.items()))
