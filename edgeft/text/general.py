"""General English that we wrote: what a model forgets, or loses in a package, shows on it."""

from __future__ import annotations

from pathlib import Path

from edgeft.text.chat import ChatTokenizer

PARAGRAPHS = Path(__file__).parent / "general.txt"  # short ones, of many kinds
ESSAY = Path(__file__).parent / "essay.txt"  # long enough to fill a context


def general_ids(chat: ChatTokenizer, num_tokens: int, width: int) -> list[list[int]]:
    """The first `num_tokens` tokens of the essay and the paragraphs, in rows of `width`."""
    text = ESSAY.read_text("utf-8") + "\n" + PARAGRAPHS.read_text("utf-8")
    ids = chat.encode_text(text)[:num_tokens]
    rows = [ids[at : at + width] for at in range(0, len(ids), width)]
    return [row for row in rows if len(row) > 1]
