"""GGUF files of the llama family: written from a Hugging Face folder, then quantised by llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ModelError
from edgeft.formats.gguf_read import GPT2_SPLIT, LLAMA3_SPLIT
from edgeft.formats.hf import read_config
from edgeft.formats.weights import open_weights
from edgeft.text.chat import ChatTokenizer

DIGIT = r"\p{N}"
ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA}
QUANTS = {
    "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q6_k": lib.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q5_k_m": lib.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q4_k_m": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0,
}
SILENT = lib.llama_log_callback(lambda level, text, user: None)  # must live as long as the library
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# The regular expressions by which a text is cut into words, one after the other -> llama.cpp's name for them.
WORDS = {(DIGIT, GPT2_SPLIT): "smollm", (GPT2_SPLIT,): "gpt-2", (LLAMA3_SPLIT,): "llama-bpe", (QWEN2_SPLIT,): "qwen2"}


def write_gguf(model: Path, out: Path, dtype: Literal["f16", "f32"]) -> None:
    """Write the model in folder `model`, with tokenizer and chat template, as `out`; vectors stay in f32.

    Raises ModelError, naming it, for an architecture, rope scaling or tokenizer that this writer does not know.
    """
    config = read_config(model)
    arch = _architecture(config)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch])
    _add_shape(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "f16" else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, model, config["vocab_size"])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    with open_weights(model) as weights:
        stored: dict[str, type[np.floating[Any]]] = {}
        for name, shape in weights.shapes.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue  # derived from rope_theta
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ModelError(f"{model}: unknown tensor {name}", "only plain llama models can be written as GGUF")
            stored[name] = np.float16 if dtype == "f16" and len(shape) > 1 else np.float32
            size = int(np.prod(shape)) * np.dtype(stored[name]).itemsize
            writer.add_tensor_info(target, shape, np.dtype(stored[name]), size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in stored.items():
            with np.errstate(over="ignore"):  # infinity is reported below, with the tensor's name
                tensor = _reorder(name, weights[name], config).astype(kind)
            if not np.isfinite(tensor).all():
                raise ModelError(f"{model}: {name} has values beyond {dtype}", "train again with a lower learning rate")
            writer.write_tensor_data(tensor)
    writer.close()


def quantize(source: Path, out: Path, quant: str, threads: int) -> None:
    """Quantise an f16 or f32 file by llama.cpp. Raises ModelError with the library's last words."""
    log: list[str] = []

    def keep(level: int, text: bytes, user: object) -> None:
        log.append(text.decode("utf-8", "replace"))

    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = QUANTS[quant], threads
    callback = lib.llama_log_callback(keep)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    finally:
        lib.llama_log_set(SILENT, ctypes.c_void_p(0))
    if status != 0 or not out.is_file():
        said = " ".join("".join(log).split())[-300:]
        raise ModelError(f"llama.cpp cannot quantise {source} to {quant}: {said}", "check the source file and the disk")


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a file have which type: k-quants fall back where a width is no multiple of 256."""
    return dict(sorted(Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors).items()))


def _architecture(config: dict[str, Any]) -> gguf.MODEL_ARCH:
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {name} cannot be written as GGUF; known: {', '.join(ARCHITECTURES)}",
            "choose a base model of the llama family or export to ONNX only",
        )
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling != "default":
        raise ModelError(
            f"rope scaling {scaling!r} cannot be written as GGUF yet; only unscaled rotary positions are known",
            "choose a base model without rope scaling or export to ONNX only",
        )
    if config.get("sliding_window"):
        raise ModelError(
            f"attention to a window of {config['sliding_window']} tokens cannot be written as GGUF's llama",
            "choose a base model without a sliding window or export to ONNX only",
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {config['hidden_act']} is not llama's (silu)", "choose another base model")
    return ARCHITECTURES[name]


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _reorder(name: str, tensor: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """llama.cpp rotates neighbouring pairs of a head's dimensions, Hugging Face its two halves."""
    heads = config["num_attention_heads"]
    if re.search(r"\.k_proj\.(weight|bias)$", name):
        heads = config.get("num_key_value_heads") or heads
    elif not re.search(r"\.q_proj\.(weight|bias)$", name):
        return tensor
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest).swapaxes(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, vocab_size: int) -> None:
    chat = ChatTokenizer.from_folder(model)
    raw = json.loads((model / "tokenizer.json").read_text("utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(raw))
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    entries = [(text, i, gguf.TokenType.NORMAL) for text, i in raw["model"]["vocab"].items()]
    for token in raw["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        entries.append((token["content"], token["id"], kind))
    for text, i, kind in entries:
        if i >= vocab_size:
            raise ModelError(
                f"{model}: token {text!r} has id {i}, the model knows {vocab_size} tokens",
                "take tokenizer and weights from the same model",
            )
        texts[i], types[i] = text, kind
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]])
    end_of_turn = chat.answer_ids("")[-1]
    writer.add_eos_token_id(end_of_turn)  # many apps stop at this one alone
    writer.add_eot_token_id(end_of_turn)
    writer.add_pad_token_id(chat.pad_id)
    bos = chat.tokenizer.token_to_id(chat.bos_token) if chat.bos_token else None
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bos is not None and chat.tokenizer.encode("a", add_special_tokens=True).ids[0] == bos)
    writer.add_chat_template(chat.template)


def pre_tokenizer_name(raw: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer.json cuts text into words, found by its structure.

    Raises ModelError if llama.cpp would tokenise otherwise, or if that is not known.
    """
    model, normalizer = raw["model"], raw.get("normalizer")
    top = raw.get("pre_tokenizer") or {}
    name = WORDS.get(tuple(_words(top.get("pretokenizers", [top]))))
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer not in (None, {"type": "NFC"}):
        name = None
    if name is None or model.get("ignore_merges", False) != (name == "llama-bpe"):
        found = {"model": model["type"], "normalizer": normalizer, "pre_tokenizer": top}
        raise ModelError(
            f"llama.cpp has no known equal of this tokenizer: {json.dumps(found)[:300]}",
            "choose a base model with a byte-level BPE tokenizer (SmolLM2, Llama 3, Qwen2) or export to ONNX only",
        )
    return name


def _words(steps: list[dict[str, Any]]) -> Iterator[str]:
    """The regular expressions of pre-tokenizer steps that end in bytes; "?" for what has no equal in llama.cpp."""
    for number, step in enumerate(steps, 1):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                yield DIGIT
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(pattern)}}:
                yield pattern
            case {"type": "ByteLevel", "add_prefix_space": False} if number == len(steps):
                if step.get("use_regex", True):
                    yield GPT2_SPLIT
            case _:
                yield "?"
    if steps[-1].get("type") != "ByteLevel":
        yield "?"
