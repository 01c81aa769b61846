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
    build = "fake 1.0"
    vocab_size = VOCAB
    stop_ids = frozenset({STOP})

    def __init__(self, answers: dict[str, str], next_probability: float = 0.25) -> None:
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
        """Gives the token that really follows exactly `next_probability`; the most goes to the one it would say."""
        for ids, positions in rows:
            chances = np.zeros((len(positions), VOCAB))
            for row, at in enumerate(positions):
                own = [*self._rest(ids[: at + 1]), STOP][0]
                chances[row, own] = 0.9 * (1 - self.next_probability)
                chances[row, ids[at + 1]] = self.next_probability
                others = chances[row] == 0
                chances[row, others] = (1 - chances[row].sum()) / others.sum()
            yield np.log(chances).astype(np.float32)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        drafts: Sequence[Sequence[int]] = (),
        on_draft: Any = None,
    ) -> list[list[int]]:
        self.prompts += [self.decode(prompt) for prompt in prompts]
        for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=False)):
            at = range(len(prompt) - 1, len(prompt) + len(draft) - 1)
            [logits] = self.score([([*prompt, *draft], at)])
            on_draft(row, logits)
        return [self._rest(prompt)[:max_new_tokens] for prompt in prompts]

    def close(self) -> None:
        self.calls.append(("close", 0))

    def text_ids(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def _rest(self, ids: Sequence[int]) -> list[int]:
        """What it would say after a conversation in which the answer may have begun."""
        question, _, begun = self.decode(ids).rpartition("<user>")[2].partition("<assistant>")
        answer = self.answers.get(question, "")
        return [ord(c) for c in answer.removeprefix(begun)] if answer.startswith(begun) else []

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return [ord(c) for m in messages for c in f"<{m['role']}>{m['content']}"] + [ord(c) for c in "<assistant>"]

    def answer_ids(self, text: str) -> list[int]:
        return [*(ord(c) for c in text), STOP]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i != STOP)


@pytest.fixture
def fake_session() -> type[FakeSession]:
    return FakeSession
