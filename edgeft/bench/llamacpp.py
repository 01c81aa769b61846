"""A GGUF file in llama.cpp, through llama-cpp-python's low-level calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import llama_cpp as lib

from edgeft.bench.batched import SLOTS, BatchedSession, Part
from edgeft.bench.llama_context import Context, Model, Tokens
from edgeft.bench.llama_grammar import LlamaGrammar
from edgeft.bench.llama_text import LlamaText
from edgeft.bench.session import Logits

PREFIX = 0  # the sequence that holds the common prefix; those of the slots come after it
KV_TYPES = {"f16": lib.GGML_TYPE_F16, "f32": lib.GGML_TYPE_F32}


class LlamaCppSession(BatchedSession):
    """`Session` over one GGUF file. `context` is the longest row in tokens; no row may be longer.

    `kv` "f32" is for comparisons tighter than the rounding of the default half-precision cache.
    """

    runtime = "llama.cpp"

    def __init__(
        self, path: Path, threads: int, context: int, kv: Literal["f16", "f32"] = "f16", mmap: bool = True
    ) -> None:
        self._model = Model(path, mmap)
        self.build = f"llama-cpp-python {lib.__version__}: {lib.llama_print_system_info().decode().strip(' |')}"
        self._threads, self.context_tokens, self._kv_type = threads, context, KV_TYPES[kv]
        self.vocab_size = self._model.vocab_size
        text = LlamaText(self._model, path)
        self.text, self.stop_ids = text, text.stop_ids
        self._single = self._make_context(context, 1)
        self._batched: Context | None = None

    def close(self) -> None:
        """Free the caches and the model; the session is of no use afterwards."""
        for owner in (self._batched, self._single, self._model):
            if owner:
                owner.free()

    def reset(self) -> None:
        super().reset()
        self._single.clear()

    def append(self, ids: Sequence[int], num_past: int) -> Logits:
        if len(ids) == 1:
            return self._single.decode_one(ids[0], num_past)
        tokens = Tokens()
        tokens.add(ids, num_past, 0, wanted=[num_past + len(ids) - 1])
        logits: Logits = self._single.decode(tokens)[0]
        return logits

    def open_slots(self, prefix: Sequence[int], num_rows: int, longest: int) -> LlamaSlots:
        """Slots in one context, which is kept for the next call if it is large enough."""
        needed = len(prefix) + max(1, (longest - len(prefix)) * min(SLOTS, num_rows))
        if self._batched is None or self._batched.cells < needed:
            if self._batched:
                self._batched.free()
            self._batched = self._make_context(needed, PREFIX + 1 + SLOTS)
        self._batched.clear()
        tokens = Tokens()
        tokens.add(prefix, 0, PREFIX)
        self._batched.decode(tokens)
        return LlamaSlots(self._batched)

    def chooser(self, gbnf: str) -> LlamaGrammar:
        """What holds one answer to a grammar."""
        return LlamaGrammar(self._model.vocab, gbnf)

    def _make_context(self, cells: int, sequences: int) -> Context:
        return Context(self._model, cells, sequences, self._threads, self._kv_type)


class LlamaSlots:
    """`Slots` as sequences of one cache: the prefix is shared, all parts are fed in one call."""

    number = SLOTS

    def __init__(self, context: Context) -> None:
        self._context = context

    def begin(self, slot: int) -> None:
        self._context.share(PREFIX, PREFIX + 1 + slot)

    def feed(self, parts: Sequence[Part]) -> list[Logits]:
        tokens = Tokens()
        for part in parts:
            tokens.add(part.ids, part.start, PREFIX + 1 + part.slot, part.wanted)
        logits_PV, found = self._context.decode(tokens), []
        for part in parts:
            found.append(logits_PV[: len(part.wanted)])
            logits_PV = logits_PV[len(part.wanted) :]
        return found

    def cut(self, slot: int, length: int) -> None:
        self._context.drop(PREFIX + 1 + slot, length)

    def free(self, slot: int) -> None:
        self._context.drop(PREFIX + 1 + slot)
