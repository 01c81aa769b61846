"""A GGUF file as one side of a comparison: any type dequantised, the rows of queries and keys put back in order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgeft.errors import ModelError
from edgeft.formats.gguf_read import CONTROL, LAYER_TENSOR_NAMES, TENSOR_NAMES, unpermute
from edgeft.formats.gguf_reader import Reader
from edgeft.formats.sides import Floats, Side, Tensor

PAIRED = ("llama", "smollm3")  # the rows of a query's or key's head stand as neighbouring pairs
ROPE_FACTORS = "rope_freqs.weight"  # derived from the rope scaling
UNUSED = 5  # gguf's type of a token that fills a place
NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FACTS = {
    "layers": "block_count",
    "hidden size": "embedding_length",
    "heads": "attention.head_count",
    "key-value heads": "attention.head_count_kv",
    "head size": "attention.key_length",
    "rope theta": "rope.freq_base",
    "norm epsilon": "attention.layer_norm_rms_epsilon",
    "context length": "context_length",
}


def gguf_side(path: Path) -> Side:
    """Raises ModelError if the file is damaged."""
    try:
        reader = Reader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}", "export the package again") from None
    meta = {name: f.contents() for name, f in reader.fields.items()}
    facts = _facts(meta)
    tensors = {}
    for tensor in (tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS):
        name = hf_name(tensor.name, meta["general.architecture"])
        tensors[name] = Tensor(tensor.tensor_type.name, _reader(tensor, name, meta["general.architecture"], facts))
        if tensor.name == "token_embd.weight":
            facts["vocabulary rows"] = int(tensor.shape[1])
    return Side(path, "gguf", facts, tensors)


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a tensor; GGUF's own where none is known."""
    if name in TENSOR_NAMES:
        return TENSOR_NAMES[name]
    known = LAYER_TENSOR_NAMES | NORMS | (GEMMA if architecture.startswith("gemma") else {})
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    return f"model.layers.{match[1]}.{known[match[2]]}.{match[3]}" if match and match[2] in known else name


def _reader(tensor: Any, name: str, architecture: str, facts: dict[str, Any]) -> Callable[[], Floats]:
    def read() -> Floats:
        try:
            values: Floats = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ModelError(
                f"{tensor.name} is stored as {kind}, which the gguf package cannot turn into numbers",
                "compare a package in another type",
            ) from None
        found = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
        if found and architecture in PAIRED:
            heads = int(facts["heads" if found[1] == "q" else "key-value heads"])
            values = unpermute(values.reshape(len(values), -1), heads).reshape(values.shape)
        return values - 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else values

    return read


def _facts(meta: dict[str, Any]) -> dict[str, Any]:
    architecture = meta["general.architecture"]
    facts = {fact: meta[f"{architecture}.{key}"] for fact, key in FACTS.items() if f"{architecture}.{key}" in meta} | {
        fact: meta[f"tokenizer.{key}"]
        for fact, key in {
            "end of turn": "ggml.eos_token_id",
            "BOS added": "ggml.add_bos_token",
            "chat template": "chat_template",
            "merges": "ggml.merges",
            "pre-tokenizer": "ggml.pre",
        }.items()
        if f"tokenizer.{key}" in meta
    }
    texts, kinds = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    if texts and kinds:
        facts["tokens"] = [None if kind == UNUSED else text for text, kind in zip(texts, kinds, strict=True)]
        facts["control tokens"] = [i for i, kind in enumerate(kinds) if kind == CONTROL]
    return facts
