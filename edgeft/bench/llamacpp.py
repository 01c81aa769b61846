"""A GGUF file in llama.cpp, through llama-cpp-python's low-level calls.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import llama_cpp as lib
import numpy as np

from edgeft.bench.llama_context import Context, Model, Tokens
from edgeft.bench.llama_grammar import LlamaGrammar
from edgeft.bench.session import Logits, Messages, OnDraft, fed_of, own_tokens
from edgeft.errors import DataError, ModelError
from edgeft.text.chat import render_template
from edgeft.text.prefix import common_prefix
from edgeft.text.spelling import Control, hide, spell

SLOTS = 16  # sequences decoded together
SCORE_TOKENS = 512  # tokens of teacher-forced rows per call: enough to fill the matrix products
PREFIX = 0  # the sequence that holds the common prefix; the slots are 1..SLOTS
PARSED = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN  # found in a text only where that is asked for
KV_TYPES = {"f16": lib.GGML_TYPE_F16, "f32": lib.GGML_TYPE_F32}


@dataclass
class _Answer:
    """An answer that grows in one slot."""

    row: int
    position: int  # of the last token, which is fed next
    ids: list[int] = field(default_factory=list)


class LlamaCppSession:
    """`Session` over one GGUF file. `context` is the longest row in tokens; no row may be longer.

    `kv` "f32" is for comparisons tighter than the rounding of the default half-precision cache.
    """

    runtime = "llama.cpp"

    def __init__(
        self, path: Path, threads: int, context: int, kv: Literal["f16", "f32"] = "f16", mmap: bool = True
    ) -> None:
        self._model = Model(path, mmap)
        self.build = f"llama-cpp-python {lib.__version__}: {lib.llama_print_system_info().decode().strip(' |')}"
        self._path, self._threads, self._context_tokens, self._kv_type = path, threads, context, KV_TYPES[kv]
        self.vocab_size = self._model.vocab_size
        vocab = self._model.vocab
        self.stop_ids = frozenset(i for i in range(self.vocab_size) if lib.llama_vocab_is_eog(vocab, i))
        self._single = self._make_context(context, 1)
        self._batched: Context | None = None
        self._num_past = 0

    def close(self) -> None:
        """Free the caches and the model; the session is of no use afterwards."""
        for owner in (self._batched, self._single, self._model):
            if owner:
                owner.free()

    def reset(self) -> None:
        self._single.clear()
        self._num_past = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.reset()
        return self._extend(ids)

    def step(self, token: int) -> Logits:
        return self._extend([token])

    def _extend(self, ids: Sequence[int]) -> Logits:
        self._check_length(self._num_past + len(ids))
        tokens = Tokens()
        tokens.add(ids, self._num_past, 0, wanted=[self._num_past + len(ids) - 1])
        self._num_past += len(ids)
        logits: Logits = self._single.decode(tokens)[0]
        return logits

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        for ids, _ in rows:
            self._check_length(len(ids))
        prefix = common_prefix([ids[: min(at)] for ids, at in rows if at])
        batches = list(_score_batches(rows, len(prefix)))
        cells = max((sum(max(at) + 1 - len(prefix) for _, at in batch if at) for batch in batches), default=0)
        context = self._batch_context(prefix, cells)
        for batch in batches:
            tokens = Tokens()
            for slot, (ids, at) in enumerate(batch, PREFIX + 1):
                if at:
                    context.share(PREFIX, slot)
                    tokens.add(ids[len(prefix) : max(at) + 1], len(prefix), slot, at)
            logits_PV = context.decode(tokens)
            for slot in range(PREFIX + 1, PREFIX + 1 + len(batch)):
                context.drop(slot)
            start = 0
            for _, at in batch:
                yield _in_order(logits_PV[start : start + len(set(at))], at)
                start += len(set(at))

    def replay(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        for ids, _ in rows:
            self._check_length(len(ids))
        for start in range(0, len(rows), SLOTS):
            yield from self._replay_together(rows[start : start + SLOTS])

    def _replay_together(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Logits]:
        context = self._batch_context([], sum(max(at) + 1 for _, at in rows))
        found: list[list[Logits]] = [[] for _ in rows]
        for step in range(max(at[-1] - at[0] for _, at in rows) + 1):
            tokens, running = Tokens(), [n for n, (_, at) in enumerate(rows) if at[0] + step <= at[-1]]
            for number in running:
                ids, at = rows[number]
                now = at[0] + step
                start = now if step else 0
                tokens.add(ids[start : now + 1], start, PREFIX + 1 + number, [now])
            for number, logits_V in zip(running, context.decode(tokens), strict=True):
                found[number].append(logits_V)
        return [np.stack(logits)[np.array(at) - at[0]] for logits, (_, at) in zip(found, rows, strict=True)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        drafts: Sequence[Sequence[int]] = (),
        on_draft: OnDraft | None = None,
    ) -> list[list[int]]:
        """As the protocol says; an answer also ends where the context is full.

        Each call feeds one token of every running answer and, where slots are free, whole new rows: a product with
        many rows costs little more than one with a few.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        if not prompts or (max_new_tokens < 1 and not drafts):
            return answers
        fed = [fed_of(draft, self.stop_ids) for draft in drafts or [()] * len(prompts)]
        for ids, draft in zip(prompts, fed, strict=True):
            self._check_length(len(ids) + max(1, len(draft)))
        prefix = common_prefix([ids[:-1] for ids in prompts])
        longest = max(len(ids) + max(max_new_tokens, len(draft)) for ids, draft in zip(prompts, fed, strict=True))
        own = min(longest, self._context_tokens) - len(prefix)
        context = self._batch_context(prefix, own * min(SLOTS, len(prompts)))
        waiting, free = deque(range(len(prompts))), list(range(PREFIX + SLOTS, PREFIX, -1))
        running: dict[int, _Answer] = {}
        while waiting or running:
            tokens = Tokens()
            for slot, answer in running.items():
                tokens.add(answer.ids[-1:], answer.position, slot, [answer.position])
                answer.position += 1
            begun = len(running)
            while waiting and free and len(tokens.ids) < SCORE_TOKENS:
                slot, row = free.pop(), waiting.popleft()
                context.share(PREFIX, slot)
                num_prompt = len(prompts[row])
                new = [*prompts[row][len(prefix) :], *fed[row]]
                tokens.add(new, len(prefix), slot, range(num_prompt - 1, num_prompt + len(fed[row])))
                running[slot] = _Answer(row, num_prompt, answers[row])
            logits_PV = context.decode(tokens)
            start = 0
            for number, (slot, answer) in enumerate(list(running.items())):
                draft = fed[answer.row] if number >= begun else ()
                part_PV = logits_PV[start : start + len(draft) + 1]
                start += len(part_PV)
                if number >= begun and on_draft:
                    on_draft(answer.row, part_PV[: len(drafts[answer.row])])
                if self._take(answer, own_tokens(draft, part_PV), max_new_tokens):
                    context.drop(slot, answer.position)
                    continue
                context.drop(slot)
                free.append(slot)
                del running[slot]
        return answers

    def _take(self, answer: _Answer, said: Sequence[int], max_new_tokens: int) -> bool:
        """Add what the model said to an answer; all but the last of it has been fed. False if the answer has ended."""
        for number, token in enumerate(said):
            if token in self.stop_ids or len(answer.ids) == max_new_tokens:
                return False
            answer.ids.append(token)
            answer.position += number > 0
        return len(answer.ids) < max_new_tokens and answer.position < self._context_tokens

    def chooser(self, gbnf: str) -> LlamaGrammar:
        """What holds one answer to a grammar."""
        return LlamaGrammar(self._model.vocab, gbnf)

    def prompt_ids(self, messages: Messages) -> list[int]:
        hidden = hide(list(messages), self._controls)
        return self._encode(self._render(hidden.value, add_generation_prompt=True), hidden.originals)

    def text_ids(self, text: str) -> list[int]:
        return self._tokenize(text, add_special=True)

    def answer_ids(self, text: str) -> list[int]:
        question, hidden = {"role": "user", "content": "?"}, hide(text, self._controls)
        prompt = self._render([question], add_generation_prompt=True)
        whole = self._render([question, {"role": "assistant", "content": hidden.value}], add_generation_prompt=False)
        ids = self._encode(whole.removeprefix(prompt), hidden.originals)
        ends = [i for i, token in enumerate(ids) if token in self.stop_ids]
        if not whole.startswith(prompt) or not ends:
            raise ModelError(
                f"the chat template in {self._path} does not end an answer with one of the stop tokens",
                "use a base model whose chat template closes every turn",
            )
        return ids[: ends[-1] + 1]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._piece(token) for token in ids).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written = lib.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, False)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    @cached_property
    def _controls(self) -> tuple[Control, ...]:
        attributes = [lib.llama_vocab_get_attr(self._model.vocab, i) for i in range(self.vocab_size)]
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

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        template = lib.llama_model_chat_template(self._model.pointer, None)
        if template is None:
            raise ModelError(f"{self._path} holds no chat template", "export the package again from a chat model")
        bos, eos = (self._text(f(self._model.vocab)) for f in (lib.llama_vocab_bos, lib.llama_vocab_eos))
        return render_template(template.decode("utf-8"), messages, add_generation_prompt, bos, eos)

    def _text(self, token: int) -> str:
        text: bytes = lib.llama_vocab_get_text(self._model.vocab, token) if token >= 0 else b""
        return text.decode("utf-8")

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self._context_tokens:
            raise DataError(
                f"a row needs {num_tokens} tokens; the session was opened for {self._context_tokens}",
                "shorten the row or open the package with a larger context",
            )

    def _batch_context(self, prefix: Sequence[int], cells: int) -> Context:
        """A context with `prefix` decoded and room for `cells` more tokens."""
        needed = len(prefix) + max(cells, 1)
        if self._batched is None or self._batched.cells < needed:
            if self._batched:
                self._batched.free()
            self._batched = self._make_context(needed, PREFIX + 1 + SLOTS)
        self._batched.clear()
        tokens = Tokens()
        tokens.add(prefix, 0, PREFIX)
        self._batched.decode(tokens)
        return self._batched

    def _make_context(self, cells: int, sequences: int) -> Context:
        return Context(self._model, cells, sequences, self._threads, self._kv_type)


def _score_batches(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], num_prefix: int
) -> Iterator[list[tuple[Sequence[int], Sequence[int]]]]:
    batch: list[tuple[Sequence[int], Sequence[int]]] = []
    num_tokens = 0
    for ids, at in rows:
        own = max(at) + 1 - num_prefix if at else 0
        if batch and (len(batch) == SLOTS or num_tokens + own > SCORE_TOKENS):
            yield batch
            batch, num_tokens = [], 0
        batch.append((ids, at))
        num_tokens += own
    if batch:
        yield batch


def _in_order(logits_PV: Logits, positions: Sequence[int]) -> Logits:
    """Rows come in ascending position; give them back as they were asked for."""
    return logits_PV[np.searchsorted(sorted(set(positions)), positions)] if positions else logits_PV
