"""What rows of token ids have in common."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all rows begin; nothing for fewer than two rows."""
    if len(rows) < 2:
        return []
    first, last = min(map(list, rows)), max(map(list, rows))  # all others sort between these two
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same]
