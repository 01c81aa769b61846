"""A model in any format, read for comparison: what it says of itself and its tensors, in Hugging Face's terms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ArtifactError, ModelError
from edgeft.formats.gguf_vocab import pre_tokenizer_name
from edgeft.formats.hf import WEIGHTS, read_config
from edgeft.formats.weights import open_weights
from edgeft.text.chat import ChatTokenizer, read_json

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: the type it is stored in, and how to get its values."""

    kind: str  # "F32", "F16", "BF16", "Q4_K", "int4", ...
    read: Callable[[], Floats]


@dataclass(frozen=True)
class Side:
    """One of two models to compare. A tied head is not among the tensors."""

    path: Path
    format: str  # "torch", "gguf", "onnx"
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path | None = None  # with config.json and tokenizer.json, where there is one
    open_files: ExitStack = field(default_factory=ExitStack)

    def tensor(self, name: str) -> Tensor | None:
        """A tied head is the embedding."""
        return self.tensors.get(EMBEDDING if name == HEAD and HEAD not in self.tensors else name)


def open_side(path: Path) -> Side:
    """A Hugging Face folder, a package or artifact folder, a .gguf or .onnx file.

    Raises ArtifactError if it is nothing of that, ModelError if it is damaged.
    """
    from edgeft.formats.side_gguf import gguf_side
    from edgeft.formats.side_onnx import onnx_side

    for name, read in (("model.gguf", gguf_side), ("model.onnx", onnx_side)):
        if path.suffix == Path(name).suffix and path.is_file():
            return read(path)
        if (path / name).is_file():
            return read(path / name)
    if (path / "config.json").is_file() and ((path / WEIGHTS).is_file() or (path / f"{WEIGHTS}.index.json").is_file()):
        return torch_side(path)
    raise ArtifactError(
        f"{path} holds no model: no model.gguf, no model.onnx, no config.json with {WEIGHTS}",
        "name a model's folder, a package's folder, or a .gguf file; an adapter is compared once it is merged",
    )


def torch_side(folder: Path) -> Side:
    """A Hugging Face folder."""
    stack = ExitStack()
    weights = stack.enter_context(open_weights(folder))
    tensors = {name: Tensor("F32", _reader(weights, name)) for name in weights.shapes if "rotary_emb" not in name}
    facts = {**config_facts(read_config(folder)), **tokenizer_facts(folder)}
    if EMBEDDING in weights.shapes:
        facts["vocabulary rows"] = weights.shapes[EMBEDDING][0]
    return Side(folder, "torch", facts, tensors, folder, stack)


def _reader(weights: Any, name: str) -> Callable[[], Floats]:
    return lambda: weights[name]


def config_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The settings in a config.json that decide what the weights compute."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has one for each kind of layer
    heads = config["num_attention_heads"]
    return {
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "heads": heads,
        "key-value heads": config.get("num_key_value_heads") or heads,
        "head size": config.get("head_dim") or config["hidden_size"] // heads,
        "rope theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "norm epsilon": float(config.get("rms_norm_eps") or config.get("layer_norm_eps") or 1e-5),
        "context length": config["max_position_embeddings"],
    }


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """What tokenizer.json and the chat template in a folder say."""
    chat = ChatTokenizer.from_folder(folder)
    raw = read_json(folder / "tokenizer.json")
    bos = chat.tokenizer.token_to_id(chat.bos_token) if chat.bos_token else None
    facts = {
        "end of turn": chat.answer_ids("")[-1],
        "BOS added": bos is not None and chat.tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos],
        "chat template": chat.template,
        "tokens": [chat.tokenizer.id_to_token(i) for i in range(max(chat.tokenizer.get_vocab().values()) + 1)],
        "control tokens": sorted(token["id"] for token in raw["added_tokens"] if token["special"]),
    }
    if raw["model"]["type"] == "BPE":
        facts["merges"] = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    with suppress(ModelError):  # only GGUF needs a name for it
        facts["pre-tokenizer"] = pre_tokenizer_name(raw)
    return facts
