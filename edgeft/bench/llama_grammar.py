"""llama.cpp's grammar as a chooser of tokens."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import llama_cpp as lib
import numpy as np

from edgeft.bench.session import Logits
from edgeft.errors import DataError

LIKELY = 32  # candidates tried first: most often the likeliest token is allowed


class LlamaGrammar:
    """Keeps one answer inside a grammar."""

    def __init__(self, vocab: Any, gbnf: str) -> None:
        self._sampler: Any = lib.llama_sampler_init_grammar(vocab, gbnf.encode(), b"root")
        if not self._sampler:
            raise DataError("llama.cpp cannot read the grammar made from the training rows", "report this task")
        self.free = weakref.finalize(self, lib.llama_sampler_free, self._sampler)

    def choose(self, logits_V: Logits) -> int:
        """The likeliest token that the grammar allows; it becomes part of the answer."""
        likely = np.argpartition(logits_V, -LIKELY)[-LIKELY:]
        token = self._first_allowed(logits_V, likely)
        if token is None:
            token = self._first_allowed(logits_V, np.arange(logits_V.size))
        if token is None:
            raise RuntimeError("the grammar allows no token at all")
        lib.llama_sampler_accept(self._sampler, token)
        return token

    def _first_allowed(self, logits_V: Logits, ids: Any) -> int | None:
        candidates = (lib.llama_token_data * len(ids))(
            *(lib.llama_token_data(int(i), float(logits_V[i]), 0.0) for i in ids)
        )
        array = lib.llama_token_data_array(candidates, len(ids), -1, False)
        lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        allowed = [(c.logit, c.id) for c in candidates if c.logit > -np.inf]
        return int(max(allowed)[1]) if allowed else None
