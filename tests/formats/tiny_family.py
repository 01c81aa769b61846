"""Tiny models of every architecture that can be written as GGUF, from integers alone: equal bytes on every machine."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from edgeft.formats.gguf_read import LLAMA3_SPLIT
from edgeft.formats.gguf_vocab import QWEN2_SPLIT, SPACE, TEKKEN_SPLIT
from tests.formats.tiny_model import TEXTS, bpe_tokenizer
from tests.text.tiny import CHATML, SPECIAL

SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {**SHAPE, "vocab_size": 356, "query_pre_attn_scalar": 16, "sliding_window": 8}
# name -> (config, llama.cpp's name of its pre-tokenizer)
FAMILY: dict[str, tuple[Any, dict[str, Any], str]] = {
    "llama": (LlamaConfig, {**SHAPE, "tie_word_embeddings": True}, "smollm"),
    "llama3": (LlamaConfig, {**SHAPE, "rope_parameters": LLAMA3_ROPE, "attention_bias": True}, "llama-bpe"),
    "mistral": (MistralConfig, {**SHAPE, "sliding_window": None}, "tekken"),
    "qwen2": (Qwen2Config, SHAPE, "qwen2"),
    "qwen3": (Qwen3Config, {**SHAPE, "tie_word_embeddings": True}, "qwen2"),
    "smollm3": (SmolLM3Config, SHAPE, "llama-bpe"),
    "gemma2": (Gemma2Config, GEMMA, "default"),
    "gemma3": (Gemma3TextConfig, {**GEMMA, "num_hidden_layers": 6}, "default"),
}


def write_tiny(family: str, folder: Path, **changes: Any) -> Path:
    """All files of a model folder of an architecture."""
    folder.mkdir(parents=True)
    kind, settings, pre = FAMILY[family]
    config: PreTrainedConfig = kind(**{**settings, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {n: _numbers(n, tuple(t.shape)) for n, t in model.state_dict().items() if n not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = sentencepiece_like() if pre == "default" else byte_level(pre)
    assert tokenizer.get_vocab_size() <= config.vocab_size
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def _numbers(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Numbers of 20 bits, so that narrower types must round: matrices around 0, norms around 1."""
    draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    numbers = draw.integers(-(2**19), 2**19, size=shape).astype(np.float32) / np.float32(2**21)
    return numbers + np.float32(1) if "norm" in name else numbers


def byte_level(pre: str) -> Tokenizer:
    """A byte-level BPE that cuts words as one of llama.cpp's pre-tokenizers does."""
    tokenizer = bpe_tokenizer()
    pattern = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT, "tekken": TEKKEN_SPLIT}.get(pre)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw = json.loads(tokenizer.to_str())
        raw["model"]["ignore_merges"] = pre in ("llama-bpe", "tekken")
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """A BPE over characters that falls back to bytes, as Gemma's tokenizer.json holds it."""
    learned = Tokenizer(models.BPE())
    replace = normalizers.Replace(" ", SPACE)
    learned.normalizer = replace
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, max_token_length=6)
    learned.train_from_iterator([text + " the there then" for text in TEXTS] * 3, trainer)
    raw = json.loads(learned.to_str())["model"]
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *raw["vocab"]]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in raw["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, "<unk>")])
    return tokenizer
