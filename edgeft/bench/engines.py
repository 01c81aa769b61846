"""Other readers of a model's tokenizer and chat template, for the prompt contract."""

from __future__ import annotations

import json
from pathlib import Path

import minijinja

from edgeft.bench.contract import Encoder
from edgeft.bench.genai_config import FILE, GenaiConfig
from edgeft.bench.session import Messages
from edgeft.errors import ModelError
from edgeft.text.chat import ChatTokenizer, raise_exception, strftime_now, tojson


def engines_of(package: Path, model: Path) -> dict[str, Encoder]:
    """transformers, minijinja if the template is in its language, and for an ONNX package onnxruntime-genai."""
    engines = {"transformers": with_transformers(model)}
    if rendered := with_minijinja(model):
        engines["minijinja"] = rendered
    if (package / FILE).is_file() and GenaiConfig.of(package).extends_in_place:  # optimum's graphs are not for it
        engines["onnxruntime-genai"] = with_genai(package)
    return engines


def with_transformers(folder: Path) -> Encoder:
    """transformers' own chat template and tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(messages: Messages) -> list[int]:
        text = str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return encode


def with_minijinja(folder: Path) -> Encoder | None:
    """The chat template as programs in Rust render it; None if it uses what minijinja does not know.

    What such programs give a template beside the conversation is given here too: strftime_now and raise_exception.
    """
    chat = ChatTokenizer.from_folder(folder)
    environment = minijinja.Environment(auto_escape_callback=lambda name: False, trim_blocks=True, lstrip_blocks=True)
    environment.add_global("raise_exception", raise_exception)
    environment.add_global("strftime_now", strftime_now)
    environment.add_filter("tojson", tojson)
    names = {"add_generation_prompt": True, "bos_token": chat.bos_token, "eos_token": chat.eos_token}

    def encode(messages: Messages) -> list[int]:
        return chat.encode_text(environment.render_template("chat", messages=list(messages), **names))

    try:
        environment.add_template("chat", chat.template)
        encode([{"role": "user", "content": "Hello"}])  # a filter that it lacks shows only now
    except minijinja.TemplateError:
        return None
    return encode


def with_genai(package: Path) -> Encoder:
    """onnxruntime-genai's chat template and tokenizer of an ONNX package; the graph is not loaded."""
    import onnxruntime_genai as genai

    try:
        tokenizer = genai.Tokenizer(genai.Config(str(package)))
    except Exception as error:  # its exceptions share no other base
        raise ModelError(
            f"onnxruntime-genai cannot read the tokenizer of {package}: {error}", "export to GGUF only"
        ) from error

    def encode(messages: Messages) -> list[int]:
        text = tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        return [int(i) for i in tokenizer.encode(text)]

    return encode
