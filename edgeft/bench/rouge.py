"""ROUGE-L: how much of a reply says the reference's words in the reference's order, whatever the language.

Words are those of Unicode's default word boundaries (UAX #29), case-folded, without punctuation: in scripts without
spaces, as Chinese, that is every character. Nothing is stemmed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

_BOUNDARY = regex.compile(r"(?V1w)\b")


def words(text: str) -> list[str]:
    """The words of a text in any language."""
    parts = _BOUNDARY.split(unicodedata.normalize("NFC", text).casefold())
    return [part for part in parts if any(c.isalnum() for c in part)]


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 100: Lin 2004, section 3.1, with recall and precision alike.

    Two texts without a word are equal: 100.
    """
    said, wanted = words(answer), words(reference)
    if not said or not wanted:
        return 100.0 if said == wanted else 0.0
    return 200.0 * common_length(said, wanted) / (len(said) + len(wanted))


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming over prefixes."""
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(row[j], above[j + 1]))
        above = row
    return above[-1]
