"""The one seam between measuring and the runtimes: a loaded package that predicts tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ArtifactError

Logits = NDArray[np.float32]
Messages = Sequence[dict[str, Any]]  # {"role": "system" | "user" | "assistant", "content": str}


class Session(Protocol):
    """A package loaded into its runtime. V is the vocabulary size, P a number of positions."""

    runtime: str  # "llama.cpp" or "onnxruntime"
    vocab_size: int
    stop_ids: frozenset[int]  # end of turn, end of text

    def reset(self) -> None:
        """Forget the context."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Feed a prompt after a reset; returns the logits [V] after its last token."""

    def step(self, token: int) -> Logits:
        """Feed one token (KV cache); returns the logits [V] after it."""

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        """For each (ids, positions): the logits [P, V] at these positions of the teacher-forced row, batched."""

    def replay(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        """What `score` gives, but token by token from the first position on, several rows taking each step together."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, batched, common prefix computed once; the stop token is not part of an answer."""

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant answers, by the package's own template and tokenizer."""

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an assistant's answer with the end-of-turn token after it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def close(self) -> None:
        """Give the memory back; the session is of no use afterwards."""


SESSIONS = {  # the file that gives a package its format -> the session that runs it
    "model.gguf": "edgeft.bench.llamacpp:LlamaCppSession",
    "model.onnx": "edgeft.bench.ort:OrtSession",
}


def open_session(package: Path, threads: int, context: int = 2048, mmap: bool = True) -> Session:
    """Load the package in folder `package`; `context` is the longest row in tokens.

    Without `mmap` llama.cpp reads its file into memory of its own; onnxruntime has no such choice.

    Raises ArtifactError if the folder holds no known package or its runtime is not installed.
    """
    for name, target in SESSIONS.items():
        if (package / name).is_file():
            module, _, cls = target.partition(":")
            choice = {} if mmap or name != "model.gguf" else {"mmap": False}
            session: Session = getattr(import_module(module), cls)(package / name, threads, context, **choice)
            return session
    raise ArtifactError(f"{package} holds none of {', '.join(SESSIONS)}", "name the folder of an exported package")
