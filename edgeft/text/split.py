"""Splits that do not leak: rows that are the same but for their slot values count as one utterance."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from edgeft.text.rows import Row

T = TypeVar("T")
EMAIL = re.compile(r"[^\s@<>]+@[^\s@<>]+\.[^\s@<>.,;:!?]+")
NUMBER = re.compile(r"\d(?:[\d.,:/-]*\d)?")
APOSTROPHES = str.maketrans("", "", "'’`´")


def user_text(row: Row) -> str:
    """All user turns of a row, one per line."""
    return "\n".join(m["content"] for m in row.messages if m["role"] == "user")


def normalise(text: str) -> str:
    """Case, punctuation and white space taken out of account; letters, digits and symbols stay, in any script."""
    folded = unicodedata.normalize("NFKC", text).casefold().translate(APOSTROPHES)
    return " ".join("".join(c if _counts(c) else " " for c in folded).split())


def mask(text: str, entities: Any = None) -> tuple[str, tuple[str, ...]]:
    """(the normalised text with <type> for slot values, the values that were masked).

    Slot values are those of `entities` ({"type": "value" or a list of them}), then e-mail addresses and numbers.
    """
    values: list[str] = []
    text = text.replace("<", " ").replace(">", " ")

    def take(slot: str, pattern: re.Pattern[str], text: str) -> str:
        def note(match: re.Match[str]) -> str:
            values.append(normalise(match[0]))
            return f" <{normalise(slot)}> "

        return "".join(  # what is masked already is left alone
            part if part.startswith("<") else pattern.sub(note, part) for part in re.split(r"(<[^<>]*>)", text)
        )

    for slot, value in sorted(_slots(entities), key=lambda s: (-len(s[1]), s)):
        whole = rf"(?<!\w){re.escape(value)}(?!\w)"
        text = take(slot, re.compile(whole, re.IGNORECASE), text)
    text = take("email", EMAIL, text)
    text = take("number", NUMBER, text)
    return normalise(text), tuple(values)


def clean_train(train: list[Row], validation: list[Row], test: list[Row]) -> tuple[list[Row], Counter[str]]:
    """Train rows without duplicates and without any whose masked text stands in validation or test; drops by reason."""
    in_test, in_validation = masked_texts(test), masked_texts(validation)
    seen: dict[tuple[str, tuple[str, ...]], str] = {}
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in train:
        key = _mask_row(row)
        answer = row.messages[-1]["content"]
        if key[0] in in_test:
            dropped["in_test"] += 1
        elif key[0] in in_validation:
            dropped["in_validation"] += 1
        elif key in seen:
            dropped["duplicate" if seen[key] == answer else "duplicate_with_other_answer"] += 1
        else:
            seen[key] = answer
            kept.append(row)
    return kept, dropped


def clean_transfer(
    transfer: list[Row], train: list[Row], validation: list[Row], test: list[Row]
) -> tuple[list[Row], Counter[str]]:
    """Prompts of which none stands in test, in validation, in train or twice; drops by reason.

    As most come without slot values, those of test and validation are compared with and without theirs masked.
    """
    seen = {_mask_row(row) for row in train} | {mask(user_text(row)) for row in train}
    held_out = {"in_test": test, "in_validation": validation}
    masked = {
        reason: masked_texts(rows) | {mask(user_text(row))[0] for row in rows} for reason, rows in held_out.items()
    }
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in transfer:
        key = _mask_row(row)
        texts = {key[0], mask(user_text(row))[0]}
        if reason := next((reason for reason, there in masked.items() if texts & there), None):
            dropped[reason] += 1
        elif key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            kept.append(row)
    return kept, dropped


def clean_validation(validation: list[Row], test: list[Row]) -> list[Row]:
    """Validation rows whose masked text does not stand in test."""
    in_test = masked_texts(test)
    return [row for row in validation if _mask_row(row)[0] not in in_test]


def masked_texts(rows: Sequence[Row]) -> frozenset[str]:
    """The normalised, slot-masked user texts of some rows."""
    return frozenset(_mask_row(row)[0] for row in rows)


def sample(rows: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` rows, drawn with `seed`, in their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _mask_row(row: Row) -> tuple[str, tuple[str, ...]]:
    return mask(user_text(row), row.meta.get("entities"))


def _slots(entities: Any) -> list[tuple[str, str]]:
    if not isinstance(entities, dict):
        return []
    listed = [
        (str(slot), v) for slot, value in entities.items() for v in (value if isinstance(value, list) else [value])
    ]
    return [
        (slot, v.replace("<", " ").replace(">", " ").strip())
        for slot, v in listed
        if isinstance(v, str) and v.strip(" <>")
    ]


@cache
def _counts(character: str) -> bool:
    # Letters, marks, numbers, symbols: vowel signs of many scripts are marks, and < > of the masks are symbols.
    return unicodedata.category(character)[0] in "LMNS"
