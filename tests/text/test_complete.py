"""System messages and target lines."""

from __future__ import annotations

from typing import Any

import pytest

from edgeft.text.complete import find_field, with_system, with_target
from edgeft.text.rows import Row, parse_row


def row(answer: str = "Sure.", **meta: Any) -> Row:
    return parse_row({"prompt": "Hi", "completion": answer, "meta": meta}, "x:1")


def test_a_system_message_is_put_in_front_only_where_there_is_none() -> None:
    once = with_system(row(), "Be brief.")
    assert once.messages[0] == {"role": "system", "content": "Be brief."}
    assert with_system(once, "Other.") == once
    assert with_system(row(), None) == row()


@pytest.mark.parametrize("target", ['{"intent": "café"}', {"intent": "café"}])
def test_the_target_becomes_the_first_line_of_the_answer(target: Any) -> None:
    done = with_target(row(target=target), "meta.target")
    assert done.messages[-1]["content"] == '{"intent": "café"}\nSure.'
    assert with_target(done, "meta.target") == done


def test_an_answer_that_only_begins_like_the_target_still_gets_it() -> None:
    assert with_target(row("yes, sir", target="yes"), "meta.target").messages[-1]["content"] == "yes\nyes, sir"
    assert with_target(row("yes", target="yes"), "meta.target").messages[-1]["content"] == "yes"


def test_only_the_last_answer_gets_the_target() -> None:
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    done = with_target(parse_row({"messages": turns, "target": "T"}, "x:1"), "target")
    assert [m["content"] for m in done.messages] == ["user", "assistant", "user", "T\nassistant"]


def test_a_row_without_the_field_is_left_alone() -> None:
    assert find_field(row(), "meta.target.deep") is None
    assert with_target(row(), "meta.target") == row()


@pytest.mark.parametrize("target", [3, ["a"], "", "two\nlines"])
def test_a_target_of_another_kind_is_refused(target: Any) -> None:
    with pytest.raises(ValueError, match="meta.target: expected one line of text or an object"):
        with_target(row(target=target), "meta.target")
