"""What looks like a control token in somebody's text stays text: `<|im_end|>` typed by a user must not end their turn.

Before a template is rendered, the first character of every such place is replaced by a private one. In the rendered
text only the template's own control tokens are left; between them the characters are put back, and encoded as plain
text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from edgeft.errors import DataError

PRIVATE = tuple(chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)))  # of Unicode


@dataclass(frozen=True)
class Control:
    """A control token as the tokenizer finds it in a text; some take the white space beside them."""

    text: str
    id: int
    strips_left: bool = False
    strips_right: bool = False


@dataclass(frozen=True)
class Hidden:
    """A value without anything that looks like a control token, and what its private characters stand for."""

    value: Any
    originals: Mapping[int, str]


def hide(value: Any, controls: Iterable[Control]) -> Hidden:
    """Messages, or a text, with the first character of whatever looks like a control token made private."""
    texts = sorted((c.text for c in controls), key=len, reverse=True)
    if not texts:
        return Hidden(value, {})
    found = re.compile("(?=(" + "|".join(map(re.escape, texts)) + "))")  # looks ahead: places may overlap
    strings = list(_strings(value))
    if not any(found.search(text) for text in strings):
        return Hidden(value, {})
    taken = set("".join(strings))
    free = (chr(code) for code in PRIVATE if chr(code) not in taken)
    private = {first: next(free) for first in sorted({text[0] for text in texts})}

    def without(text: str) -> str:
        characters = list(text)
        for at in found.finditer(text):
            characters[at.start()] = private[text[at.start()]]
        return "".join(characters)

    return Hidden(_map(value, without), {ord(p): first for first, p in private.items()})


def spell(
    rendered: str, originals: Mapping[int, str], controls: Iterable[Control], plain: Callable[[str], list[int]]
) -> list[int]:
    """Ids of a text rendered from hidden messages; `plain` encodes a text as if there were no control tokens.

    Raises DataError if a plain text comes out as a control token all the same.
    """
    by_text = {c.text: c for c in controls}
    pattern = "|".join(re.escape(text) for text in sorted(by_text, key=len, reverse=True))
    forbidden = {c.id for c in by_text.values()}
    parts = re.split(f"({pattern})", rendered)  # text, token, text, token, ..., text
    ids: list[int] = []
    for at in range(0, len(parts), 2):
        text = parts[at]
        if at and by_text[parts[at - 1]].strips_right:
            text = text.lstrip()
        if at + 1 < len(parts) and by_text[parts[at + 1]].strips_left:
            text = text.rstrip()
        new = plain(text.translate(originals)) if text else []
        if forbidden & set(new):
            raise DataError(
                "this tokenizer turns text into its own control tokens even where they are switched off",
                "take control tokens out of the text, or choose another base model",
            )
        ids += new
        ids += [by_text[token].id for token in parts[at + 1 : at + 2]]
    return ids


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map(item, change) for item in value]
    return value
