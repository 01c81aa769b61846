"""Rows completed as the recipe asks: a system message in front, a target line on top of the last answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgeft.text.rows import Row


def with_system(row: Row, system: str | None) -> Row:
    """The row with a system message in front, unless it has one or `system` is None."""
    if system is None or row.messages[0]["role"] == "system":
        return row
    return replace(row, messages=({"role": "system", "content": system}, *row.messages))


def find_field(row: Row, dotted: str) -> Any:
    """The value at a dotted path (meta.target_json) of the row as it was read; None if there is none."""
    value: Any = {**row.raw, "meta": row.meta}
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def with_target(row: Row, dotted: str) -> Row:
    """The row with its field `dotted` as first line of the last answer; unchanged where it stands there or is missing.

    An object is written as compact JSON. Raises ValueError if the field is neither text of one line nor an object.
    """
    target = find_field(row, dotted)
    if target is None:
        return row
    line = json.dumps(target, ensure_ascii=False) if isinstance(target, dict) else target
    if not isinstance(line, str) or not line.strip() or "\n" in line.strip():
        raise ValueError(f"{dotted}: expected one line of text or an object, found {target!r:.60}")
    line = line.strip()
    answer = row.messages[-1]["content"]
    if answer == line or answer.startswith(line + "\n"):
        return row
    return replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": f"{line}\n{answer}"}))
