"""The two parts of an answer."""

from __future__ import annotations

import pytest

from edgeft.text.answer import first_line_json, split_answer


def test_the_first_line_and_the_reply_are_told_apart() -> None:
    assert split_answer('\n {"a": 1} \nHello\n\nyou \n') == ('{"a": 1}', "Hello\n\nyou")
    assert split_answer("one line") == ("one line", "")


def test_the_first_line_is_read_as_json() -> None:
    assert first_line_json('{"intent": "x", "entities": {"id": "7"}}\nReply') == {
        "intent": "x",
        "entities": {"id": "7"},
    }


@pytest.mark.parametrize(
    "text", ["", "Hello", "[1]", "3", '{"a": 1', '{"a": NaN}', '{"a": 1} tail', 'x\n{"a": 1}', "[" * 100_000]
)
def test_anything_but_an_object_is_none(text: str) -> None:
    assert first_line_json(text) is None
