"""A GGUF file of the llama architecture becomes plain weights, a config and a tokenizer; numpy only.

Tensor names and metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from edgeft.errors import ModelError
from edgeft.formats.gguf_reader import Reader

TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # gguf token types that are matched before the text is split


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file says, in Hugging Face terms."""

    weights: dict[str, NDArray[np.float32]]
    config: dict[str, Any]  # config.json
    tokenizer: Tokenizer
    special: dict[str, int]  # bos, eos, pad, unk -> token id, those that the file names
    chat_template: str


def read_gguf(path: Path) -> GgufModel:
    """Read and dequantise a GGUF file. Weights are the exact float32 values that its blocks stand for.

    Raises ModelError if it is damaged, or holds something that a plain LlamaForCausalLM does not express.
    """
    reader, meta = _open(path)
    weights = _weights(reader, meta, path)
    special = {
        short: int(_value(meta, f"tokenizer.ggml.{name}_token_id", path))
        for short, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{name}_token_id" in meta
    }
    if "eos" not in special:
        raise ModelError(f"{path}: names no end-of-text token", "take an instruct model with a complete tokenizer")
    return GgufModel(
        weights,
        _config(weights, meta, special, path),
        _tokenizer(meta, path),
        special,
        str(_value(meta, "tokenizer.chat_template", path)),
    )


def read_shape(path: Path) -> dict[str, int]:
    """The sizes of the network under the names of config.json. Raises ModelError as `read_gguf` does."""
    _, meta = _open(path)
    heads = _value(meta, "llama.attention.head_count", path)
    return {
        "num_hidden_layers": int(_value(meta, "llama.block_count", path)),
        "num_key_value_heads": int(_value(meta, "llama.attention.head_count_kv", path, heads)),
        "intermediate_size": int(_value(meta, "llama.feed_forward_length", path)),
        "hidden_size": int(_value(meta, "llama.embedding_length", path)),
    }


def _open(path: Path) -> tuple[Reader, dict[str, Any]]:
    try:
        reader = Reader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}", "fetch the file again") from None
    meta = dict(reader.fields)
    architecture = _value(meta, "general.architecture", path)
    if architecture != "llama":
        raise ModelError(
            f"{path}: architecture {architecture!r}; a GGUF base must be of architecture 'llama'",
            "start from the model's Hugging Face folder or hub id instead",
        )
    return reader, meta


def _value(meta: dict[str, Any], key: str, path: Path, default: Any = None) -> Any:
    if key in meta:
        return meta[key].contents()
    if default is None:
        raise ModelError(f"{path}: the file has no {key!r}", "take a complete instruct model in GGUF format")
    return default


def _weights(reader: Reader, meta: dict[str, Any], path: Path) -> dict[str, NDArray[np.float32]]:
    heads = int(_value(meta, "llama.attention.head_count", path))
    kv_heads = int(_value(meta, "llama.attention.head_count_kv", path, heads))
    weights: dict[str, NDArray[np.float32]] = {}
    unknown = []
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is None:
            unknown.append(tensor.name)
            continue
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = unpermute(weight, heads if "q_proj" in name else kv_heads)
        weights[name] = np.ascontiguousarray(weight)
    layers = int(_value(meta, "llama.block_count", path))
    expected = {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{n}.{hf}.weight" for n in range(layers) for hf in LAYER_TENSOR_NAMES.values()
    }
    missing = sorted(expected - set(weights))
    if unknown or missing or (set(weights) - expected) - {"lm_head.weight"}:
        raise ModelError(
            f"{path}: not a plain llama model: tensors it should not have {unknown[:3]}, missing {missing[:3]}",
            "biases, experts and rope factors are not supported here: start from the Hugging Face folder instead",
        )
    return weights


def _hf_name(name: str) -> str | None:
    if name in TENSOR_NAMES:
        return TENSOR_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in LAYER_TENSOR_NAMES:
        return f"model.layers.{match[1]}.{LAYER_TENSOR_NAMES[match[2]]}.weight"
    return None


def unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection from llama.cpp's order (rotary pairs adjacent) to Hugging Face's (halves)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(
    weights: dict[str, NDArray[np.float32]], meta: dict[str, Any], special: dict[str, int], path: Path
) -> dict[str, Any]:
    scaling = _value(meta, "llama.rope.scaling.type", path, "none")
    if scaling != "none":
        raise ModelError(
            f"{path}: rope scaling {scaling!r}; only plain rotary embeddings are supported in a GGUF base",
            "start from the model's Hugging Face folder or hub id instead",
        )
    vocab, hidden = weights["model.embed_tokens.weight"].shape
    heads = int(_value(meta, "llama.attention.head_count", path))
    theta = _decimal(_value(meta, "llama.rope.freq_base", path, 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": special.get("bos"),
        "dtype": "float32",
        "eos_token_id": special["eos"],
        "head_dim": int(_value(meta, "llama.attention.key_length", path, hidden // heads)),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "max_position_embeddings": int(_value(meta, "llama.context_length", path)),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": int(_value(meta, "llama.block_count", path)),
        "num_key_value_heads": int(_value(meta, "llama.attention.head_count_kv", path, heads)),
        "pad_token_id": special.get("pad"),
        "rms_norm_eps": _decimal(_value(meta, "llama.attention.layer_norm_rms_epsilon", path)),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "use_cache": True,
        "vocab_size": vocab,
    }


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: GGUF's 9.99999975e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _tokenizer(meta: dict[str, Any], path: Path) -> Tokenizer:
    kind = _value(meta, "tokenizer.ggml.model", path)
    pre = _value(meta, "tokenizer.ggml.pre", path, "default")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2", "llama-bpe"):
        raise ModelError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r}; "
            "known here: 'gpt2' with 'smollm', 'gpt-2' or 'llama-bpe'",
            "start from the model's Hugging Face folder or hub id, which brings its own tokenizer.json",
        )
    tokens = _value(meta, "tokenizer.ggml.tokens", path)
    merges = [tuple(merge.split(" ", 1)) for merge in _value(meta, "tokenizer.ggml.merges", path)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"{path}: its tokenizer is damaged: {error}", "fetch the file again") from None
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _value(meta, "tokenizer.ggml.token_type", path)
    added = [(token, k) for token, k in zip(tokens, kinds, strict=True) if k in (CONTROL, USER_DEFINED)]
    for token, k in added:
        tokenizer.add_tokens([AddedToken(token, special=k == CONTROL, normalized=False)])
    return tokenizer


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT if pre == "llama-bpe" else GPT2_SPLIT), "isolated", invert=False)
    return pre_tokenizers.Sequence([*digits, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
