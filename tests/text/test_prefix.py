from __future__ import annotations

import pytest

from edgeft.text.prefix import common_prefix


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4, 5], [1, 2]], [1, 2]),
        ([[1, 2, 3], (1, 2, 3)], [1, 2, 3]),
        ([[3, 1], [9, 1]], []),
        ([[1, 2], []], []),
        ([[1, 2, 3]], []),
        ([], []),
    ],
)
def test_the_prefix_is_what_all_rows_begin_with(rows: list[list[int]], expected: list[int]) -> None:
    assert common_prefix(rows) == expected
