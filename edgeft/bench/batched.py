"""What sessions do with many rows, the same in every runtime: scoring, replaying token by token, greedy answers.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edgeft.bench.session import Logits, Messages, OnDraft
from edgeft.errors import DataError
from edgeft.text.prefix import common_prefix

SLOTS = 16  # most rows at once
CALL_TOKENS = 512  # tokens of new rows per call: enough to fill the matrix products

Row = tuple[Sequence[int], Sequence[int]]  # token ids, and the positions after which logits are wanted


@dataclass(frozen=True)
class Part:
    """Tokens for one slot from position `start` on; `wanted` are positions of the row, in ascending order."""

    slot: int
    start: int
    ids: Sequence[int]
    wanted: Sequence[int]


class Slots(Protocol):
    """Rows that a runtime holds at the same time, numbered from 0. All of them begin with one prefix."""

    number: int

    def begin(self, slot: int) -> None:
        """Let the slot hold the prefix alone."""

    def feed(self, parts: Sequence[Part]) -> list[Logits]:
        """Feed each part, which goes on where its slot ends; returns the logits [P, V] that it wants."""

    def cut(self, slot: int, length: int) -> None:
        """Forget the slot's tokens from position `length` on."""

    def free(self, slot: int) -> None:
        """Forget the slot's row."""


class TextSide(Protocol):
    """The tokenizer and chat template of a package; see `Session` for most methods."""

    @property
    def start_id(self) -> int:
        """The token that stands for the beginning of a text: BOS, or end of text in a model without one."""

    def render(self, messages: Messages, add_generation_prompt: bool) -> str: ...

    def prompt_ids(self, messages: Messages) -> list[int]: ...

    def text_ids(self, text: str) -> list[int]: ...

    def answer_ids(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass
class _Answer:
    """An answer that grows in one slot, and how many tokens stand before it."""

    row: int
    num_prompt: int
    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of its last token, which is fed next."""
        return self.num_prompt + len(self.ids) - 1


class BatchedSession(ABC):
    """The part of `Session` that follows from `append`, `open_slots` and `text`, which a runtime adds."""

    vocab_size: int
    stop_ids: frozenset[int]
    context_tokens: int  # longest row
    text: TextSide
    _num_past = 0  # tokens that the single row holds

    @abstractmethod
    def append(self, ids: Sequence[int], num_past: int) -> Logits:
        """Feed the next tokens of the single row, which holds `num_past`; returns the logits [V] after the last."""

    @abstractmethod
    def open_slots(self, prefix: Sequence[int], num_rows: int, longest: int) -> Slots:
        """Slots for up to `num_rows` rows of up to `longest` tokens, the prefix included."""

    def reset(self) -> None:
        self._num_past = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.reset()
        return self._extend(ids)

    def step(self, token: int) -> Logits:
        return self._extend([token])

    def _extend(self, ids: Sequence[int]) -> Logits:
        self.check_length(self._num_past + len(ids))
        logits = self.append(ids, self._num_past)
        self._num_past += len(ids)
        return logits

    def score(self, rows: Sequence[Row]) -> Iterator[Logits]:
        """As the protocol says; rows may be asked at the same position twice, and in any order."""
        self.check_length(max((len(ids) for ids, _ in rows), default=0))
        prefix = common_prefix([ids[: min(at)] for ids, at in rows if at])
        batches = list(_batches(rows, len(prefix)))
        if not batches:
            return
        longest = max((max(at) + 1 for _, at in rows if at), default=1)
        slots = self.open_slots(prefix, max(map(len, batches)), longest)
        for batch in batches:
            for start in range(0, len(batch), slots.number):
                yield from self._score_together(slots, len(prefix), batch[start : start + slots.number])

    def _score_together(self, slots: Slots, num_prefix: int, rows: Sequence[Row]) -> Iterator[Logits]:
        asked = [(slot, ids, at) for slot, (ids, at) in enumerate(rows) if at]
        for slot, _, _ in asked:
            slots.begin(slot)
        parts = [Part(slot, num_prefix, ids[num_prefix : max(at) + 1], sorted(set(at))) for slot, ids, at in asked]
        found = {part.slot: logits for part, logits in zip(parts, slots.feed(parts), strict=True)} if parts else {}
        for part in parts:
            slots.free(part.slot)
        for slot, (_, at) in enumerate(rows):
            if not at:
                yield np.empty((0, self.vocab_size), np.float32)
            else:
                yield found[slot][np.searchsorted(sorted(set(at)), at)]

    def replay(self, rows: Sequence[Row]) -> Iterator[Logits]:
        """As the protocol says; positions are in ascending order."""
        if not rows:
            return
        longest = max(len(ids) for ids, _ in rows)
        self.check_length(longest)
        slots = self.open_slots([], len(rows), longest)
        for start in range(0, len(rows), slots.number):
            yield from _replay_together(slots, rows[start : start + slots.number])

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
        sizes = [(len(ids), len(draft)) for ids, draft in zip(prompts, fed, strict=True)]
        self.check_length(max(prompt + max(1, draft) for prompt, draft in sizes))
        longest = max(prompt + max(max_new_tokens, draft) for prompt, draft in sizes)
        prefix = common_prefix([ids[:-1] for ids in prompts])
        slots = self.open_slots(prefix, len(prompts), min(longest, self.context_tokens))
        waiting, free = deque(range(len(prompts))), list(reversed(range(slots.number)))
        running: dict[int, _Answer] = {}
        while waiting or running:
            parts = [Part(slot, a.position, a.ids[-1:], [a.position]) for slot, a in running.items()]
            begun, num_tokens = len(parts), len(parts)
            while waiting and free and num_tokens < CALL_TOKENS:
                slot, row = free.pop(), waiting.popleft()
                slots.begin(slot)
                new = [*prompts[row][len(prefix) :], *fed[row]]
                end = len(prompts[row]) + len(fed[row])
                parts.append(Part(slot, len(prefix), new, range(len(prompts[row]) - 1, end)))
                running[slot] = _Answer(row, len(prompts[row]), answers[row])
                num_tokens += len(new)
            for number, (part, logits_PV) in enumerate(zip(parts, slots.feed(parts), strict=True)):
                answer = running[part.slot]
                draft = fed[answer.row] if number >= begun else ()
                if number >= begun and on_draft:
                    on_draft(answer.row, logits_PV[: len(drafts[answer.row])])
                if self._take(answer, own_tokens(draft, logits_PV), max_new_tokens):
                    if draft:
                        slots.cut(part.slot, answer.position)
                    continue
                slots.free(part.slot)
                free.append(part.slot)
                del running[part.slot]
        return answers

    def _take(self, answer: _Answer, said: Sequence[int], max_new_tokens: int) -> bool:
        """Add what the model said to an answer; False if the answer has ended."""
        for token in said:
            if token in self.stop_ids or len(answer.ids) == max_new_tokens:
                return False
            answer.ids.append(token)
        return len(answer.ids) < max_new_tokens and answer.position < self.context_tokens

    def check_length(self, num_tokens: int) -> None:
        """Raises DataError if a row is longer than the session was opened for."""
        if num_tokens > self.context_tokens:
            raise DataError(
                f"a row needs {num_tokens} tokens; the session was opened for {self.context_tokens}",
                "shorten the row or open the package with a larger context",
            )

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self.text.prompt_ids(messages)

    def text_ids(self, text: str) -> list[int]:
        return self.text.text_ids(text)

    def answer_ids(self, text: str) -> list[int]:
        return self.text.answer_ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.text.decode(ids)


def _batches(rows: Sequence[Row], num_prefix: int) -> Iterator[list[Row]]:
    """Rows that are scored in one call."""
    batch: list[Row] = []
    num_tokens = 0
    for ids, at in rows:
        own = max(at) + 1 - num_prefix if at else 0
        if batch and (len(batch) == SLOTS or num_tokens + own > CALL_TOKENS):
            yield batch
            batch, num_tokens = [], 0
        batch.append((ids, at))
        num_tokens += own
    if batch:
        yield batch


def _replay_together(slots: Slots, rows: Sequence[Row]) -> list[Logits]:
    found: list[list[Logits]] = [[] for _ in rows]
    for slot in range(len(rows)):
        slots.begin(slot)
    for step in range(max(at[-1] - at[0] for _, at in rows) + 1):
        parts = []
        for slot, (ids, at) in enumerate(rows):
            now = at[0] + step
            if now <= at[-1]:
                start = now if step else 0
                parts.append(Part(slot, start, ids[start : now + 1], [now]))
        for part, logits_PV in zip(parts, slots.feed(parts), strict=True):
            found[part.slot].append(logits_PV[0])
            if part.wanted[0] == rows[part.slot][1][-1]:
                slots.free(part.slot)
    return [np.stack(logits)[np.array(at) - at[0]] for logits, (_, at) in zip(found, rows, strict=True)]


def fed_of(draft: Sequence[int], stop_ids: frozenset[int]) -> Sequence[int]:
    """The tokens of a draft that are fed: nothing follows a stop token at its end."""
    return draft[:-1] if draft and draft[-1] in stop_ids else draft


def own_tokens(fed: Sequence[int], logits_PV: Logits) -> list[int]:
    """What the model itself says, given the logits [P, V] before each of the fed tokens and after the last.

    Its own tokens as long as they are those that were fed, and the one with which it leaves them.
    """
    likeliest: list[int] = logits_PV.argmax(axis=1).tolist()
    same = next((i for i, token in enumerate(fed) if token != likeliest[i]), len(fed))
    return likeliest[: same + 1]


class Extendable(Protocol):
    """One row of a runtime that computes rows one by one."""

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on."""

    def extend(self, ids: Sequence[int], wanted: Sequence[int]) -> Logits:
        """Feed tokens; returns the logits [P, V] after those whose numbers in `ids` are wanted."""


class OneSlot:
    """`Slots` of a runtime that computes rows one by one."""

    number = 1

    def __init__(self, row: Extendable, prefix: Sequence[int]) -> None:
        self._row, self._num_prefix = row, len(prefix)
        row.rewind(0)
        if prefix:
            row.extend(prefix, [])

    def begin(self, slot: int) -> None:
        self._row.rewind(self._num_prefix)

    def feed(self, parts: Sequence[Part]) -> list[Logits]:
        return [self._row.extend(part.ids, [at - part.start for at in part.wanted]) for part in parts]

    def cut(self, slot: int, length: int) -> None:
        self._row.rewind(length)

    def free(self, slot: int) -> None:
        """The next row to begin rewinds it."""
