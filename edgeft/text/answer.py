"""An answer has two parts: a first line for the app (JSON) and the reply for the person."""

from __future__ import annotations

import json
from typing import Any


def split_answer(text: str) -> tuple[str, str]:
    """(first line, the rest), both without white space around them; the rest is '' if there is one line only."""
    first, _, reply = text.strip().partition("\n")
    return first.strip(), reply.strip()


def first_line_json(text: str) -> dict[str, Any] | None:
    """The first line as a JSON object, or None if it is anything else (NaN and Infinity are no JSON)."""
    try:
        value = json.loads(split_answer(text)[0], parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
