"""Width cuts: copies of a model with fewer feed-forward channels, key-value heads or channels of the hidden state.

Which stay is decided by `importance`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from edgeft.errors import ModelError
from edgeft.learning_settings import WIDTH_UNIT
from edgeft.shrink.goal import check_kind
from edgeft.shrink.importance import norms_of

SHARED_WITH_MISTRAL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """Channels or groups that stay, ascending, one list for each layer (one in all for the hidden state)."""

    kept: list[list[int]]
    removed: list[list[int]]
    lost: list[float]  # the share of importance that was removed: why these went


def strongest(importance: Sequence[torch.Tensor], keep: int) -> Selection:
    """The `keep` most important entries of each vector."""
    kept, removed, lost = [], [], []
    for values in importance:
        order = values.argsort(descending=True, stable=True)
        kept.append(sorted(order[:keep].tolist()))
        removed.append(sorted(order[keep:].tolist()))
        lost.append(float(values[order[keep:]].sum() / values.sum()) if len(order) > keep else 0.0)
    return Selection(kept, removed, lost)


@torch.no_grad()
def keep_ffn(model: Any, channels: Sequence[Sequence[int]]) -> Any:
    """A copy with only these feed-forward channels in each layer: as many everywhere."""
    check_kind(model.config)
    student = copy.deepcopy(model)
    for layer, kept in zip(student.get_decoder().layers, channels, strict=True):
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            _keep_outputs(linear, torch.tensor(kept))
        _keep_inputs(layer.mlp.down_proj, torch.tensor(kept))
        layer.mlp.intermediate_size = len(kept)
    student.config.intermediate_size = len(channels[0])
    return student


@torch.no_grad()
def keep_groups(model: Any, groups: Sequence[Sequence[int]]) -> Any:
    """A copy with only these key-value heads in each layer, each with its query heads: as many everywhere."""
    check_kind(model.config)
    student = copy.deepcopy(model)
    config, size = student.config, _head_size(student)
    for layer, kept in zip(student.get_decoder().layers, groups, strict=True):
        attention, ratio = layer.self_attn, config.num_attention_heads // config.num_key_value_heads
        for linear in (attention.k_proj, attention.v_proj):
            _keep_outputs(linear, _spread(kept, size))
        _keep_outputs(attention.q_proj, _spread(kept, ratio * size))
        _keep_inputs(attention.o_proj, _spread(kept, ratio * size))
    config.num_attention_heads = ratio * len(groups[0])
    config.num_key_value_heads = len(groups[0])
    config.head_dim = size  # hidden size / heads no longer gives it
    return student


@torch.no_grad()
def keep_hidden(model: Any, channels: Sequence[int], factors: Mapping[str, float]) -> Any:
    """A copy with only these channels of the hidden state.

    A norm divides by the root mean square of the channels that are left, which is another one: each norm's weight is
    multiplied by its entry of `factors` (`importance.norm_factors`).
    """
    check_kind(model.config)
    student, kept = copy.deepcopy(model), torch.tensor(channels)
    config, decoder, size = student.config, student.get_decoder(), _head_size(student)
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    tied = head.weight is embedding.weight
    for name, norm in norms_of(student):
        norm.weight = _parameter(norm.weight[kept] * factors[name])
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _keep_inputs(reader, kept)
        for writer in (attention.o_proj, mlp.down_proj):
            _keep_outputs(writer, kept)
        layer.hidden_size = mlp.hidden_size = len(kept)
    embedding.weight, embedding.embedding_dim = _parameter(embedding.weight[:, kept]), len(kept)
    _keep_inputs(head, kept)
    if tied:
        head.weight = embedding.weight
    config.hidden_size, config.head_dim = len(kept), size  # hidden size / heads no longer gives it
    return student


def loadable(model: Any) -> Any:
    """A cut model, or the same as a Mistral: transformers loads no Llama whose hidden size is no multiple of its heads.

    Without a sliding window the two compute the same. Raises ModelError for a Llama with biases, which Mistral lacks.
    """
    config = model.config
    if config.model_type != "llama" or config.hidden_size % config.num_attention_heads == 0:
        return model
    if config.attention_bias or config.mlp_bias:
        raise ModelError(
            f"a Llama with biases and {config.num_attention_heads} heads cannot have a hidden size of "
            f"{config.hidden_size}, as that is no multiple",
            f"choose student.hidden as a multiple of {math.lcm(WIDTH_UNIT, config.num_attention_heads)}, or null",
        )
    kept = {name: value for name, value in config.to_dict().items() if name in SHARED_WITH_MISTRAL}
    other: Any = MistralForCausalLM(MistralConfig(**kept, sliding_window=None)).to(model.device, model.dtype)
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation(config._attn_implementation)
    return other.eval()


def _head_size(model: Any) -> int:
    size: int = model.get_decoder().layers[0].self_attn.head_dim
    return size


def _spread(groups: Sequence[int], size: int) -> torch.Tensor:
    """The channels of these groups of `size` neighbours."""
    return (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten()


def _keep_inputs(linear: nn.Linear, kept: torch.Tensor) -> None:
    linear.weight, linear.in_features = _parameter(linear.weight[:, kept]), len(kept)


def _keep_outputs(linear: nn.Linear, kept: torch.Tensor) -> None:
    linear.weight, linear.out_features = _parameter(linear.weight[kept]), len(kept)
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias[kept])


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous())
