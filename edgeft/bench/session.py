"""The one seam between measuring and the runtimes: a loaded package that predicts tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeft.bench.runtimes import RUNTIMES, runtime_of

Logits = NDArray[np.float32]
OnDraft = Callable[[int, Logits], None]
Messages = Sequence[dict[str, Any]]  # {"role": "system" | "user" | "assistant", "content": str}


class Session(Protocol):
    """A package loaded into its runtime. V is the vocabulary size, P a number of positions."""

    runtime: str  # the library's name
    build: str  # the runtime's version and build flags
    vocab_size: int
    stop_ids: frozenset[int]  # end of turn, end of text

    def reset(self) -> None:
        """Forget the context."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Feed a prompt after a reset; returns the logits [V] after its last token."""

    def step(self, token: int) -> Logits:
        """Feed one token (KV cache); returns the logits [V] after it, which the next call may write over."""

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        """For each (ids, positions): the logits [P, V] at these positions of the teacher-forced row, batched."""

    def replay(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        """What `score` gives, but token by token from the first position on, several rows taking each step together."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        drafts: Sequence[Sequence[int]] = (),
        on_draft: OnDraft | None = None,
    ) -> list[list[int]]:
        """Greedy answers, batched, common prefix computed once; the stop token is not part of an answer.

        `drafts` guess the answers, one for each prompt: all of a draft is computed at once, and what the model would
        have said itself is kept (speculative decoding: Leviathan et al. 2023, arXiv:2211.17192). `on_draft(row,
        logits)` gets the logits [P, V] before each of the draft's P tokens.
        """

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant answers, by the package's own template and tokenizer."""

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, as its beginning: with the tokens that the model's tokenizer puts in front."""

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an assistant's answer with the end-of-turn token after it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def close(self) -> None:
        """Give the memory back; the session is of no use afterwards."""


def open_session(
    package: Path, threads: int, context: int = 2048, mmap: bool = True, runtime: str | None = None
) -> Session:
    """Load the package in folder `package`; `context` is the longest row in tokens.

    Without `mmap` llama.cpp reads its file into memory of its own; the others have no such choice. `runtime` is a name
    of `RUNTIMES`; None takes the first that can run the package.
    Raises ArtifactError if the folder holds no known package, or one that `runtime` cannot run.
    """
    name = runtime_of(package, runtime)
    module, _, cls = RUNTIMES[name].session.partition(":")
    choice = {} if mmap or name != "llama.cpp" else {"mmap": False}
    session: Session = getattr(import_module(module), cls)(package / RUNTIMES[name].file, threads, context, **choice)
    return session
