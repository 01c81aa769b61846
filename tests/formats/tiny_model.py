"""A tiny random llama with its own tokenizer as a Hugging Face folder, and what torch predicts with it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgeft.formats.probe import Probe
from edgeft.text.chat import ChatTokenizer
from tests.text.tiny import CHATML, SPECIAL

HEADS, KV_HEADS, LAYERS = 4, 2, 4
TEXTS = ["Where is my order 12345?", "I'd like a refund, please.", "Grüße aus Köln!", "Cancel the order of 3 lamps."]


def bpe_tokenizer() -> Tokenizer:
    """A byte-level BPE trained on a few sentences, cut into words as SmolLM2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def write_tiny_llama(
    folder: Path, tie: bool = True, seed: int = 0, network: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """All files of a model folder; `network` makes another model, `changes` go into its config.json alone.

    Weights are wide enough for peaked predictions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bpe_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "vocab_size": 320,  # more than the tokenizer has, as padded checkpoints do
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(**{**settings, **(network or {})}, **ids, tie_word_embeddings=tie)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "rope_theta": 5000.0, **changes}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "pad_token": SPECIAL[0]}))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def torch_logits(folder: Path, ids: list[int]) -> NDArray[np.float32]:
    """What torch in float32 predicts after each token [S, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def make_probe(folder: Path, texts: list[str]) -> Probe:
    """Every text as question and as answer, with torch's logits on the answer."""
    chat = ChatTokenizer.from_folder(folder)
    rows, positions, logits = [], [], []
    for text in texts:
        prompt, answer = chat.prompt_ids([{"role": "user", "content": text}]), chat.answer_ids(text)
        rows.append(prompt + answer)
        positions.append(list(range(len(prompt) - 1, len(prompt) + len(answer) - 1)))
        logits.append(torch_logits(folder, rows[-1])[positions[-1]])
    return Probe(rows, positions, np.concatenate(logits))


def tiny_onnx(factory: pytest.TempPathFactory, tie: bool = True) -> tuple[Path, Path]:
    """Folders of a tiny model and of its fp32 ONNX package; read only. A build takes seconds: once per session."""
    return _tiny_onnx(factory.getbasetemp(), tie)


@cache
def _tiny_onnx(folder: Path, tie: bool) -> tuple[Path, Path]:
    from edgeft.formats.onnx import build_onnx

    model = write_tiny_llama(folder / f"tiny-{tie}", tie=tie)
    build_onnx(model, folder / f"tiny-onnx-{tie}")
    return model, folder / f"tiny-onnx-{tie}"
