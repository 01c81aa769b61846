"""Conversations become token ids and a mask that says which of them are learnt: the assistant's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import DataError
from edgeft.text.chat import ChatTokenizer, Messages

REPLAY = "replay.jsonl"  # the file of a dataset with general rows to learn beside the others
TRANSFER = "transfer.jsonl"  # messages without answers, for the teacher to answer
ANSWERS = "answers.json"  # of a dataset with answers of a teacher: how many rows are labelled, how many taught
MAX_NAMED = 10  # rows named in one error


@dataclass(frozen=True)
class Encoded:
    """One row. `trained[i]`: token i is an assistant token to learn; never true for i = 0."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


def encode_row(chat: ChatTokenizer, messages: Messages, max_tokens: int, where: str) -> Encoded:
    """Token ids and mask of one conversation; what follows the last learnt token is left out.

    The text before an answer is tokenised as the prompt is at inference, the answer on its own, as it is generated.
    Learnt is every answer with its end-of-turn token. Raises DataError naming `where` if the row is longer than
    `max_tokens`, has nothing to learn, or cannot be rendered turn by turn.
    """
    encoded = _encode(chat, messages, where)
    if len(encoded.ids) > max_tokens:
        raise _too_long([(where, len(encoded.ids))], max_tokens)
    return encoded


def load_encoded(path: Path, chat: ChatTokenizer, max_tokens: int) -> list[Encoded]:
    """All rows of a dataset file, encoded. Raises DataError, naming all rows that are too long at once.

    Of a row {"text"} all tokens are learned, as many as are allowed.
    """
    rows = [(f"{path.name}:{n}", row) for n, row in enumerate(read_rows(path), 1)]
    encoded = [
        encode_text(chat, row["text"], max_tokens) if "text" in row else _encode(chat, row["messages"], where)
        for where, row in rows
    ]
    too_long = [
        (where, len(row.ids)) for (where, _), row in zip(rows, encoded, strict=True) if len(row.ids) > max_tokens
    ]
    if too_long:
        raise _too_long(too_long, max_tokens)
    return encoded


def encode_text(chat: ChatTokenizer, text: str, max_tokens: int | None = None) -> Encoded:
    """Plain text without a chat around it: every token but the first is learned."""
    ids = tuple(chat.tokenizer.encode(text, add_special_tokens=True).ids[:max_tokens])
    return Encoded(ids, (False, *[True] * (len(ids) - 1)))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a dataset artifact's file: {"messages": [...], "meta": {...}} or {"text": ...}."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def _encode(chat: ChatTokenizer, messages: Messages, where: str) -> Encoded:
    ids: list[int] = []
    trained: list[bool] = []
    done = ""  # the text that `ids` stands for
    hidden = chat.hide(list(messages))
    messages = hidden.value
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(chat, messages[:number], True, where)
        whole = _render(chat, messages[: number + 1], False, where)
        if not prompt.startswith(done) or not whole.startswith(prompt) or not whole.endswith(chat.turn_tail):
            raise DataError(
                f"{where}: the chat template renders the first {number + 1} turns differently once more follow, "
                "so no answer can be told from its prompt",
                "cut the row to one answer, or take a model whose template only appends",
            )
        answer = whole[len(prompt) : len(whole) - len(chat.turn_tail)]
        for text, learn in ((prompt[len(done) :], False), (answer + chat.turn_end, True)):
            new = chat.encode_text(text, hidden.originals)
            ids += new
            trained += [learn] * len(new)
        done = whole[: len(prompt) + len(answer) + len(chat.turn_end)]
    if not any(trained[1:]):
        raise DataError(f"{where}: no assistant turn, so there is nothing to learn", "give the row an answer")
    if trained[0]:
        raise DataError(f"{where}: the row starts with the answer", "put a user turn in front of it")
    return Encoded(tuple(ids), tuple(trained))


def _render(chat: ChatTokenizer, messages: Messages, add_generation_prompt: bool, where: str) -> str:
    try:
        return chat.render(messages, add_generation_prompt)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from None


def _too_long(rows: list[tuple[str, int]], max_tokens: int) -> DataError:
    named = ", ".join(f"{where} ({tokens})" for where, tokens in rows[:MAX_NAMED])
    more = f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else ""
    return DataError(
        f"{len(rows)} row{'s' if len(rows) > 1 else ''} longer than {max_tokens} tokens: {named}{more}",
        f"set max_tokens to {max(tokens for _, tokens in rows)} or shorten the rows",
    )
