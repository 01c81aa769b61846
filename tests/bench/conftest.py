"""A deterministic session: letters are tokens, answers come from a table, logits are chosen by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

STOP = 0
VOCAB = 512


class FakeSession:
    """Answers a conversation whose last user turn it knows; otherwise says nothing."""

    runtime = "fake"
    vocab_size = VOCAB
    stop_ids = frozenset({STOP})

    def __init__(self, answers: dict[str, str], next_probability: float = 0.5) -> None:
        self.answers = answers
        self.next_probability = next_probability
        self.calls: list[tuple[str, int]] = []
        self.prompts: list[str] = []
        self._fed: list[int] = []

    def reset(self) -> None:
        self._fed = []
        self.calls.append(("reset", 0))

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._fed = list(ids)
        self.calls.append(("prefill", len(ids)))
        return self._logits()

    def step(self, token: int) -> NDArray[np.float32]:
        self._fed.append(token)
        self.calls.append(("step", token))
        return self._logits()

    def _logits(self) -> NDArray[np.float32]:
        logits = np.zeros(VOCAB, np.float32)
        logits[len(self._fed) % VOCAB] = 1.0
        return logits

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[NDArray[np.float32]]:
        """Gives the token that really follows exactly `next_probability`."""
        for ids, positions in rows:
            logits = np.zeros((len(positions), VOCAB), np.float32)
            odds = self.next_probability * (VOCAB - 1) / (1 - self.next_probability)
            for row, at in enumerate(positions):
                logits[row, ids[at + 1]] = np.log(odds)
            yield logits

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            text = self.decode(prompt)
            self.prompts.append(text)
            last = text.rpartition("<user>")[2].removesuffix("<assistant>")
            answers.append([ord(c) for c in self.answers.get(last, "")][:max_new_tokens])
        return answers

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return [ord(c) for m in messages for c in f"<{m['role']}>{m['content']}"] + [ord(c) for c in "<assistant>"]

    def answer_ids(self, text: str) -> list[int]:
        return [*(ord(c) for c in text), STOP]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i != STOP)


@pytest.fixture
def fake_session() -> type[FakeSession]:
    return FakeSession
