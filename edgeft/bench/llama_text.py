"""The tokenizer and chat template inside a GGUF file, as llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import llama_cpp as lib

from edgeft.bench.llama_context import Model, piece
from edgeft.bench.session import Messages
from edgeft.errors import ModelError
from edgeft.text.chat import render_template
from edgeft.text.spelling import Control, hide, spell

PARSED = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN  # found in a text only where that is asked for


class LlamaText:
    """Texts to token ids and back; see `Session` for the methods."""

    def __init__(self, model: Model, path: Path) -> None:
        self._model, self._path = model, path
        bos, eos = (int(f(model.vocab)) for f in (lib.llama_vocab_bos, lib.llama_vocab_eos))
        self.start_id = bos if bos >= 0 else eos
        self.stop_ids = frozenset(i for i in range(model.vocab_size) if lib.llama_vocab_is_eog(model.vocab, i))

    def prompt_ids(self, messages: Messages) -> list[int]:
        hidden = hide(list(messages), self._controls)
        return self._encode(self.render(hidden.value, add_generation_prompt=True), hidden.originals)

    def text_ids(self, text: str) -> list[int]:
        return self._tokenize(text, add_special=True)

    def answer_ids(self, text: str) -> list[int]:
        question, hidden = {"role": "user", "content": "?"}, hide(text, self._controls)
        prompt = self.render([question], add_generation_prompt=True)
        whole = self.render([question, {"role": "assistant", "content": hidden.value}], add_generation_prompt=False)
        ids = self._encode(whole.removeprefix(prompt), hidden.originals)
        ends = [i for i, token in enumerate(ids) if token in self.stop_ids]
        if not whole.startswith(prompt) or not ends:
            raise ModelError(
                f"the chat template in {self._path} does not end an answer with one of the stop tokens",
                "use a base model whose chat template closes every turn",
            )
        return ids[: ends[-1] + 1]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(piece(self._model.vocab, token, special=False) for token in ids).decode("utf-8", "replace")

    @cached_property
    def _controls(self) -> tuple[Control, ...]:
        attributes = [lib.llama_vocab_get_attr(self._model.vocab, i) for i in range(self._model.vocab_size)]
        return tuple(
            Control(
                self._text(i), i, bool(attr & lib.LLAMA_TOKEN_ATTR_LSTRIP), bool(attr & lib.LLAMA_TOKEN_ATTR_RSTRIP)
            )
            for i, attr in enumerate(attributes)
            if attr & PARSED and self._text(i)
        )

    def _encode(self, text: str, originals: Mapping[int, str]) -> list[int]:
        if not originals:
            return self._tokenize(text)
        return spell(text, originals, self._controls, lambda part: self._tokenize(part, parse_special=False))

    def _tokenize(self, text: str, parse_special: bool = True, add_special: bool = False) -> list[int]:
        raw = text.encode("utf-8")
        room = len(raw) + 8  # a token stands for at least one byte
        buffer = (lib.llama_token * room)()
        written = lib.llama_tokenize(self._model.vocab, raw, len(raw), buffer, room, add_special, parse_special)
        return list(buffer[:written])

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        template = lib.llama_model_chat_template(self._model.pointer, None)
        if template is None:
            raise ModelError(f"{self._path} holds no chat template", "export the package again from a chat model")
        bos, eos = (self._text(f(self._model.vocab)) for f in (lib.llama_vocab_bos, lib.llama_vocab_eos))
        return render_template(template.decode("utf-8"), messages, add_generation_prompt, bos, eos)

    def _text(self, token: int) -> str:
        text: bytes = lib.llama_vocab_get_text(self._model.vocab, token) if token >= 0 else b""
        return text.decode("utf-8")
