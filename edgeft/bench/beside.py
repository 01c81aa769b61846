"""What two models, in any format, answer to the same question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeft.bench.host import physical_cores
from edgeft.bench.session import Messages, open_session


def greedy_answer(model: Path, messages: Messages, max_new_tokens: int) -> tuple[list[int], str]:
    """Token ids and text of a package's, or of a Hugging Face folder's, greedy answer."""
    session = open_session(model, physical_cores())
    try:
        [ids] = session.generate([session.prompt_ids(messages)], max_new_tokens)
        return ids, session.decode(ids)
    finally:
        session.close()


def answers_beside(models: Sequence[Path], messages: Messages, max_new_tokens: int = 160) -> list[tuple[str, str]]:
    """The last question with each model's answer, and where the answers part; named for a table."""
    from edgeft.formats.parity import part_at

    question = max(n for n, message in enumerate(messages) if message["role"] == "user")
    answers = [greedy_answer(model, messages[: question + 1], max_new_tokens) for model in models]
    at = part_at(answers[0][0], answers[1][0])
    said = [(name, text) for name, (_, text) in zip("AB", answers, strict=True)]
    parted = "nowhere" if at is None else f"token {at + 1}"
    return [("question", messages[question]["content"]), *said, ("they part at", parted)]
