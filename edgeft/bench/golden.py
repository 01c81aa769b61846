"""golden.json: prompts, their token ids and a package's greedy answers, for an app to test itself with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.bench.contract import conversations
from edgeft.bench.conversations import ANSWERED
from edgeft.bench.session import Session
from edgeft.errors import DataError
from edgeft.text.chat import ChatTokenizer

FILE = "golden.json"
ANSWER_TOKENS = 24
MARGIN = 1.0  # in nats between the two likeliest tokens: other processors round otherwise, but by less than this
ABOUT = (
    "prompt_ids are exact on every machine. answer_ids are what this package says, likeliest token by likeliest token; "
    "the first `certain` of them are clear enough to be the same on other processors."
)


def needed_context(chat: ChatTokenizer) -> int:
    """Tokens that the longest golden conversation takes."""
    found = _rendered(chat)
    return max(len(found[name][1]) for name in ANSWERED if name in found) + ANSWER_TOKENS


def write_golden(session: Session, chat: ChatTokenizer, package: Path) -> None:
    """Write `golden.json` into the package's folder."""
    entries: list[dict[str, Any]] = []
    for name, (messages, prompt_ids) in _rendered(chat).items():
        entry: dict[str, Any] = {"name": name, "messages": messages, "prompt_ids": prompt_ids}
        if name in ANSWERED:
            answer_ids, certain = greedy(session, prompt_ids, ANSWER_TOKENS)
            entry |= {"answer_ids": answer_ids, "certain": certain, "answer": session.decode(answer_ids)}
        entries.append(entry)
    golden = {
        "about": ABOUT,
        "runtime": session.runtime,
        "max_new_tokens": ANSWER_TOKENS,
        "stop_ids": sorted(session.stop_ids),
        "conversations": entries,
    }
    (package / FILE).write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", "utf-8")


def greedy(session: Session, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], int]:
    """The likeliest tokens one after the other, without the stop token, and how many of the first are certain."""
    ids: list[int] = []
    certain, unbroken = 0, True
    logits_V = session.prefill(prompt_ids)
    while True:
        second, first = np.partition(logits_V, -2)[-2:]
        token = int(logits_V.argmax())
        if token in session.stop_ids:
            return ids, certain
        ids.append(token)
        unbroken = unbroken and bool(first - second > MARGIN)
        certain += unbroken
        if len(ids) == max_new_tokens:
            return ids, certain
        logits_V = session.step(token)


def _rendered(chat: ChatTokenizer) -> dict[str, tuple[Any, list[int]]]:
    """Messages and prompt ids of every conversation that the template takes."""
    found = {}
    for name, messages in conversations(chat).items():
        try:
            found[name] = (messages, chat.prompt_ids(messages))
        except DataError:
            continue
    return found
