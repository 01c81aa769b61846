"""Leaks and duplicates between splits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeft.text.rows import Row, parse_row
from edgeft.text.split import clean_train, clean_transfer, clean_validation, mask, normalise, sample


def row(question: str, answer: str = "ok", **entities: Any) -> Row:
    return parse_row({"prompt": question, "completion": answer, "meta": {"entities": entities}}, "x:1")


def test_case_punctuation_and_space_do_not_count() -> None:
    assert normalise("  Where's MY — order?!\n") == normalise("wheres my order") == "wheres my order"


def test_letters_of_every_script_count() -> None:
    assert normalise("कृपया रद्द करें") == "कृपया रद्द करें"
    assert normalise("Straße") == normalise("STRASSE")
    assert normalise("😀") != normalise("😡")


@pytest.mark.parametrize(
    ("text", "entities", "masked", "values"),
    [
        ("Cancel AF-482913, please", {"order_id": "AF-482913"}, "cancel <order id> please", ("af 482913",)),
        ("cancel af-482913", {"order_id": "AF-482913"}, "cancel <order id>", ("af 482913",)),
        ("the Otto and Otto 2", {"a": "Otto", "b": "Otto 2"}, "the <a> and <b>", ("otto 2", "otto")),
        ("Tern, Ternary, intern", {"product": "Tern"}, "<product> ternary intern", ("tern",)),
        ("from A or B", {"place": ["A", "B"]}, "from <place> or <place>", ("a", "b")),
        ("mail j.d+x@ex-1.org. Thanks", None, "mail <email> thanks", ("j d+x ex 1 org",)),
        ("pay $48.20 by 12/04 at 5", None, "pay $ <number> by <number> at <number>", ("48 20", "12 04", "5")),
        ("a <number> b", None, "a number b", ()),
        ("x", {"n": 3, "none": None, "empty": ""}, "x", ()),
    ],
)
def test_slot_values_are_masked(text: str, entities: Any, masked: str, values: tuple[str, ...]) -> None:
    assert mask(text, entities) == (masked, values)


@given(st.text(max_size=60), st.dictionaries(st.text(max_size=5), st.text(max_size=10), max_size=3))
def test_masking_takes_any_text(text: str, entities: dict[str, str]) -> None:
    masked, _ = mask(text, entities)
    assert masked == mask(text, entities)[0]


def test_a_train_row_that_differs_from_a_test_row_only_in_its_slots_is_dropped() -> None:
    train = [row("Where is 123?", order="123"), row("Where is my hat?"), row("When is 5?")]
    kept, dropped = clean_train(train, [row("when is 7")], [row("where is 999", order="999")])
    # an order number in one split and a plain number in the other: both rows are masked by their own values
    assert [r.messages[0]["content"] for r in kept] == ["Where is my hat?"]
    assert dropped == {"in_test": 1, "in_validation": 1}


def test_exact_duplicates_are_kept_once_and_other_values_count_as_other_rows() -> None:
    train = [row("pay 5"), row("Pay 5!"), row("pay 6"), row("pay 5", answer="no")]
    kept, dropped = clean_train(train, [], [])
    assert [r.messages[0]["content"] for r in kept] == ["pay 5", "pay 6"]
    assert dropped == {"duplicate": 1, "duplicate_with_other_answer": 1}


def test_all_user_turns_count() -> None:
    first = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Yes?"}
    rows = [
        parse_row({"messages": [first, answer, {"role": "user", "content": text}, answer]}, "x:1")
        for text in ("cancel it", "track it")
    ]
    assert clean_train(rows[:1], [], rows[1:])[0] == rows[:1]
    assert clean_train(rows[:1], [], rows)[0] == []


def test_validation_loses_what_stands_in_test() -> None:
    assert clean_validation([row("a"), row("b 1")], [row("B, 2")]) == [row("a")]


def test_a_sample_is_seeded_and_keeps_the_order() -> None:
    rows = list(range(100))
    drawn = sample(rows, 10, seed=1)
    assert drawn == sorted(drawn) == sample(rows, 10, seed=1)
    assert len(set(drawn)) == 10
    assert drawn != sample(rows, 10, seed=2)
    assert sample(rows, None, 0) == sample(rows, 200, 0) == rows


def test_a_message_to_be_answered_stands_in_no_other_split_whatever_is_known_of_its_slots() -> None:
    transfer = [
        row("Where is 123?"),  # in test, whose order number is known there and not here
        row("where is 999"),  # the same with its very number
        row("Send it to Ann", name="Ann"),  # in validation, with another name
        row("send it to bob"),  # the very words of validation
        row("pay 5"),  # in train
        row("pay 6"), row("Pay 6!"),  # new, and the same again
    ]  # fmt: skip
    held_out = [row("send it to Bob", name="Bob")], [row("where is 999", order="999")]
    kept, dropped = clean_transfer(transfer, [row("Pay 5.")], *held_out)
    assert kept == [transfer[5]]
    assert dropped == {"in_test": 2, "in_validation": 2, "duplicate": 2}
