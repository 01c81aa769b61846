"""The architectures that can be written as GGUF: one row each, with what llama.cpp wants to know about it.

What llama.cpp's graph of an architecture cannot express is refused here by name, never left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ModelError

Config = dict[str, Any]
NOPE_EVERY = 4  # llama.cpp's SmolLM3 has no rotary positions in every fourth layer, and no key to say otherwise
GEMMA2_PATTERN, GEMMA3_PATTERN = 2, 6  # of so many layers the last attends to everything; fixed in llama.cpp
GEMMA_27B = {GEMMA2_PATTERN: 46, GEMMA3_PATTERN: 62}  # layers of the one size that llama.cpp scales otherwise


@dataclass(frozen=True)
class Architecture:
    """How the weights of a Hugging Face architecture stand in a GGUF file."""

    arch: gguf.MODEL_ARCH
    paired: bool = False  # llama.cpp rotates neighbouring pairs of a head's dimensions, Hugging Face its two halves
    norm_offset: float = 0.0  # added to norm weights, which Hugging Face's code adds when it runs
    activation: str = "silu"
    head: bool = True  # whether an output head of its own is possible
    shape: Callable[[gguf.GGUFWriter, Config], None] = lambda writer, config: None  # keys of its own
    limits: Callable[[Config], Iterator[str]] = lambda config: iter(())  # what llama.cpp would compute otherwise


def architecture(model: Path | str, config: Config) -> Architecture:
    """The row of a model's architecture.

    Raises ModelError, naming it, for an architecture or a property of it that llama.cpp would not compute as torch.
    """
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{model}: architecture {name} cannot be written as GGUF; known: {', '.join(ARCHITECTURES)}",
            "choose a base model of the llama family or export to ONNX only",
        )
    row = ARCHITECTURES[name]
    found = config.get("hidden_act") or config.get("hidden_activation") or row.activation
    problems = [*row.limits(config), *_rope_limits(config)]
    if found != row.activation:
        problems.append(f"activation {found} instead of {row.activation}")
    if problems:
        raise ModelError(
            f"{model}: {name} with {'; '.join(problems)} cannot be written as GGUF: llama.cpp computes otherwise",
            "choose another base model or export to ONNX only",
        )
    return row


def add_shape(writer: gguf.GGUFWriter, config: Config, row: Architecture) -> None:
    """Everything about the network that is no tensor."""
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    rope = rope_settings(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    row.shape(writer, config)


def head_size(config: Config) -> int:
    """Dimensions of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_settings(config: Config, kind: str = "full_attention") -> Config:
    """Rotary positions of the layers of a kind, from where either generation of transformers writes them."""
    older = dict(config.get("rope_scaling") or {})
    if "type" in older:
        older["rope_type"] = older.pop("type")
    rope = {**(config.get("rope_parameters") or {}), **older}
    if kind in rope:
        rope = dict(rope[kind])
    elif kind == "sliding_attention":
        rope = {"rope_theta": config.get("rope_local_base_freq")}
    theta = rope.get("rope_theta") or config.get("rope_theta")
    return {**rope, "rope_theta": theta, "rope_type": rope.get("rope_type") or "default"}


def rope_factors(config: Config) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by, for Llama 3's scaling; None for every other.

    Low frequencies are stretched, high ones left, those between blended (Llama 3.1's reference code).
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequencies = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope["original_max_position_embeddings"]
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / float(frequency)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _rope_limits(config: Config) -> Iterator[str]:
    rope = rope_settings(config)
    known = {"default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
    known["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    kind = rope["rope_type"]
    if kind not in known:
        yield f"rope scaling {kind!r}"
    elif missing := [key for key in known[kind] if key not in rope]:
        yield f"rope scaling {kind!r} without {', '.join(missing)}"
    if kind == "yarn" and (other := {"attention_factor", "beta_fast", "beta_slow", "mscale"} & set(rope)):
        yield f"yarn's {', '.join(sorted(other))}"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        yield "partial rotary positions"


def _llama_shape(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_size(config))


def _gemma2_shape(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma3_shape(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base_swa(rope_settings(config, "sliding_attention")["rope_theta"] or 10000.0)
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _full_attention(config: Config) -> Iterator[str]:
    window = config.get("sliding_window")
    kinds = set(config.get("layer_types") or ())
    used = config.get("use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    if window and used and window < config["max_position_embeddings"]:
        yield f"a sliding window of {window} tokens"


def _smollm3_limits(config: Config) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    rotated = [int((layer + 1) % NOPE_EVERY != 0) for layer in range(layers)]
    if (config.get("no_rope_layers") or rotated) != rotated:
        yield "other layers without rotary positions than every fourth"
    yield from _full_attention(config)


def _gemma_pattern(config: Config, pattern: int) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    kinds = ["full_attention" if (n + 1) % pattern == 0 else "sliding_attention" for n in range(layers)]
    if (config.get("layer_types") or kinds) != kinds or config.get("sliding_window_pattern", pattern) != pattern:
        yield f"another order of layers than one of full attention in {pattern}"
    scale = head_size(config)
    if layers == GEMMA_27B[pattern]:
        scale = config["hidden_size"] // config["num_attention_heads"]
    if config.get("query_pre_attn_scalar", scale) != scale:
        yield f"attention scaled for a head of {config['query_pre_attn_scalar']} dimensions instead of {scale}"


def _gemma3_limits(config: Config) -> Iterator[str]:
    yield from _gemma_pattern(config, GEMMA3_PATTERN)
    if config.get("attn_logit_softcapping"):
        yield "attention logits capped"


_LLAMA = Architecture(gguf.MODEL_ARCH.LLAMA, paired=True, shape=_llama_shape, limits=_full_attention)
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": Architecture(
        gguf.MODEL_ARCH.SMOLLM3, paired=True, shape=_llama_shape, limits=_smollm3_limits
    ),
    "Qwen2ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN2, limits=_full_attention),
    "Qwen3ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN3, limits=_full_attention),
    "Gemma2ForCausalLM": Architecture(
        gguf.MODEL_ARCH.GEMMA2, norm_offset=1.0, activation="gelu_pytorch_tanh", head=False, shape=_gemma2_shape,
        limits=lambda config: _gemma_pattern(config, GEMMA2_PATTERN),
    ),
    "Gemma3ForCausalLM": Architecture(
        gguf.MODEL_ARCH.GEMMA3, norm_offset=1.0, activation="gelu_pytorch_tanh", head=False, shape=_gemma3_shape,
        limits=_gemma3_limits,
    ),
}  # fmt: skip
