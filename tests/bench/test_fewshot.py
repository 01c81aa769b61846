from __future__ import annotations

import json
from typing import Any

from edgeft.bench.fewshot import choose, few_shot_prefix, system_text
from edgeft.bench.task import Task

TASK = Task("kind", "slots")


def row(user: str, kind: str, **slots: str) -> dict[str, Any]:
    content = json.dumps({"kind": kind, "slots": slots}) + "\nDone."
    return {
        "messages": [
            {"role": "system", "content": "You are the desk."},
            {"role": "user", "content": user},
            {"role": "assistant", "content": content},
        ]
    }


def users(rows: list[dict[str, Any]]) -> list[str]:
    return [r["messages"][1]["content"] for r in rows]


TRAIN = [row(f"{kind} {'x' * length}", kind) for kind in "abcdef" for length in (30, 2, 9)]


def test_examples_are_spread_over_the_labels_and_short() -> None:
    assert users(choose(TRAIN, TASK, 3)) == ["a xx", "c xx", "e xx"]


def test_more_examples_than_labels_give_second_ones() -> None:
    chosen = users(choose(TRAIN, TASK, 8))
    assert len(set(chosen)) == 8
    assert {text[0] for text in chosen[:6]} == set("abcdef")
    assert all(len(text) <= 11 for text in chosen)


def test_more_examples_than_rows_give_every_row_once() -> None:
    assert sorted(users(choose(TRAIN[:4], TASK, 99))) == sorted(users(TRAIN[:4]))


def test_a_row_with_the_usual_fields_comes_before_a_shorter_one_without() -> None:
    rows = [row("hi", "a"), row("where is 12?", "a", number="12"), row("where is 3456?", "a", number="3456")]
    assert users(choose(rows, TASK, 1)) == ["where is 12?"]


def test_the_system_text_lists_what_stands_in_the_training_rows() -> None:
    text = system_text([row("u", "beta", size="L"), row("v", "alpha", colour="red")], TASK)
    assert text.startswith("You are the desk.\n")
    assert '"kind" is one of: alpha, beta.' in text
    assert "colour, size" in text
    assert "reply follows" in text


def test_the_prefix_is_one_system_message_and_pairs() -> None:
    prefix = few_shot_prefix(TRAIN, TASK, 2)
    assert [m["role"] for m in prefix] == ["system", "user", "assistant", "user", "assistant"]
    assert prefix == few_shot_prefix(list(TRAIN), TASK, 2)


def test_no_examples_mean_no_prefix() -> None:
    assert few_shot_prefix(TRAIN, TASK, 0) == []
    assert few_shot_prefix([], TASK, 5) == []


def test_rows_without_json_give_examples_alone() -> None:
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    assert few_shot_prefix([plain], TASK, 3) == plain["messages"]
