"""The text of each token of a GGUF file, for a runtime that takes prompts as text and not as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib

from edgeft.bench.llama_context import Model, piece


class Pieces:
    """Bytes of tokens by llama.cpp's own table; the weights are mapped, and never read."""

    def __init__(self, path: Path) -> None:
        self._model = Model(path, True)
        vocab = self._model.vocab
        self._bos = lib.llama_vocab_bos(vocab) if lib.llama_vocab_get_add_bos(vocab) else None

    def of(self, ids: Sequence[int]) -> dict[str, Any]:
        """{"ids", "pieces"}: each piece holds its bytes as characters. A first token that the runtime puts before every
        text itself has none."""
        pieces = [piece(self._model.vocab, token, special=True).decode("latin-1") for token in ids]
        if ids and ids[0] == self._bos:
            pieces[0] = ""
        return {"ids": list(ids), "pieces": pieces}

    def ids(self, text: str) -> list[int]:
        """Tokens of an answer's text, control tokens not among them."""
        raw = text.encode("utf-8")
        buffer = (lib.llama_token * (len(raw) + 8))()
        written = lib.llama_tokenize(self._model.vocab, raw, len(raw), buffer, len(buffer), False, False)
        return list(buffer[:written])
