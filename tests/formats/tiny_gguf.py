"""A tiny llama model as GGUF, written the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.text.tiny import CHATML, SPECIAL, tiny_tokenizer

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 32, 64, 4, 2, 2
BYTES = tiny_tokenizer()
VOCAB = [*(BYTES.id_to_token(i) for i in range(BYTES.get_vocab_size())), "12", "ab"]  # two tokens by merging


def tiny_weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights under their GGUF names, query and key rows in Hugging Face's order."""
    draw = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
    }
    shapes |= {"ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
    weights = {"token_embd.weight": (len(VOCAB), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        weights |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        weights |= {f"blk.{layer}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    return {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in weights.items()}


def permute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from halves (i, i + half) to pairs (2i, 2i + 1), written out row by row."""
    size = weight.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(
    path: Path,
    weights: dict[str, NDArray[np.float32]] | None = None,
    architecture: str = "llama",
    pre: str = "smollm",
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **extra: Any,
) -> Path:
    """Write a complete file; `extra` metadata is added as strings. Matrices are stored as `quant`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer, pre)
    for key, value in extra.items():
        writer.add_string(key.replace("__", "."), value)
    for name, weight in (weights or tiny_weights()).items():
        stored = (
            permute(weight, HEADS if "attn_q" in name else KV_HEADS) if "attn_q" in name or "attn_k" in name else weight
        )
        kind = quant if stored.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCAB)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in VOCAB])
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
