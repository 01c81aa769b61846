"""Tiny random decoders of every kind that can be cut in width, and rows for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from edgeft.text.encode import Encoded
from edgeft.tune.batches import Batch, collate

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
}  # fmt: skip
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


def tiny_decoder(kind: str, tied: bool = True, **changes: Any) -> Any:
    """4 layers, 64 hidden channels, 96 of feed-forward, 4 groups of 2 query heads and a key-value head of 8."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "initializer_range": 0.15, "pad_token_id": 0,
        "rms_norm_eps": 1e-12,
    }  # fmt: skip
    config = CONFIGS[kind](**{**shape, **BIASES.get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows() -> list[Batch]:
    """Two batches of rows of unequal length."""
    generator = torch.Generator().manual_seed(1)
    made = [
        Encoded(tuple(torch.randint(1, 64, (n,), generator=generator).tolist()), tuple(i > 3 for i in range(n)))
        for n in (9, 12, 7, 20)
    ]
    return [collate(made[:2], pad_id=0), collate(made[2:], pad_id=0)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(1, 21)[None]).logits
    return found
