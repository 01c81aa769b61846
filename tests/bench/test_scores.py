from __future__ import annotations

from typing import Any

import pytest

from edgeft.bench.scores import (
    MIN_SLICE,
    calibration,
    confusion,
    escalation,
    label_table,
    shares_of_labels,
    slice_table,
    slices_of,
    worst_slice,
)
from edgeft.bench.stats import wilson

GOLD = ["a", "a", "a", "b", "b", "c"]
SAID = ["a", "a", "b", "b", None, "zzz"]


def test_a_label_has_precision_recall_and_f1() -> None:
    table = {entry["label"]: entry for entry in label_table(GOLD, SAID)}
    assert list(table) == ["a", "b", "c"]  # the commonest first
    assert (table["a"]["precision"], table["a"]["recall"][0], table["a"]["f1"]) == (1.0, pytest.approx(2 / 3), 0.8)
    assert (table["b"]["precision"], table["b"]["recall"][0]) == (0.5, 0.5)
    assert table["c"]["precision"] is None  # never said: no precision, not 0
    assert shares_of_labels(GOLD, SAID) == pytest.approx(((1 + 0.5 + 0) / 3, (2 / 3 + 0.5 + 0) / 3))


def test_confusion_counts_what_is_no_label_without_quoting_it() -> None:
    assert confusion(GOLD, SAID) == {
        "a": {"a": 2, "b": 1}, "b": {"(no label)": 1, "b": 1}, "c": {"(unknown label)": 1},
    }  # fmt: skip


def test_escalation_counts_what_was_passed_on_rightly() -> None:
    found = escalation(GOLD, SAID, ["b", "c"])
    assert (found["rows"], found["passed_on"], found["rightly"]) == (3, 2, 1)
    assert (found["precision"], found["recall"]) == (wilson(1, 2), wilson(1, 3))
    assert "precision" not in escalation(GOLD, [None] * 6, ["b"])


def test_slices_are_fields_with_few_values_and_only_values_with_enough_rows() -> None:
    metas: list[dict[str, Any]] = [
        {"id": f"row-{i}", "source": "web" if i < 70 else "phone", "text": "rare" if i == 3 else "usual",
         "entities": {"order": i}, "always": "same"}
        for i in range(100)
    ]  # fmt: skip
    found = slices_of(metas)
    assert found[0] == {"source": "web", "text": "usual"} and found[99]["source"] == "phone"
    assert "text" not in found[3]  # a value of one row could be that row's own words
    assert all(set(row) <= {"source", "text"} for row in found)


def rows_of(field: str, *groups: tuple[str, int, int]) -> list[dict[str, Any]]:
    """(value, rows, right ones) each."""
    return [
        {"slices": {field: value}, "joint_correct": i < right} for value, number, right in groups for i in range(number)
    ]


def test_the_worst_slice_is_named_with_its_interval_and_small_ones_are_not_judged() -> None:
    rows = rows_of("source", ("web", 100, 95), ("phone", 40, 20), ("fax", MIN_SLICE - 1, 0))
    table = slice_table(rows)
    assert [(entry["value"], entry["n"]) for entry in table] == [("phone", 40), ("web", 100)]
    worst = worst_slice(table, wilson(115, 159))
    assert worst is not None
    assert (worst["field"], worst["value"], worst["looked_at"], worst["clearly_worse"]) == ("source", "phone", 2, True)
    assert not worst_slice(slice_table(rows_of("x", ("y", 30, 28))), wilson(28, 30))["clearly_worse"]  # type: ignore[index]
    assert worst_slice([], wilson(1, 2)) is None


def test_calibration_is_the_gap_between_confidence_and_truth() -> None:
    sure = calibration([0.95] * 10 + [0.55] * 10, [True] * 5 + [False] * 5 + [True] * 5 + [False] * 5)
    assert sure["ece"][0] == pytest.approx((0.45 + 0.05) / 2)
    assert [(entry["from"], entry["n"], entry["right"]) for entry in sure["bins"]] == [(0.5, 10, 0.5), (0.9, 10, 0.5)]
    assert calibration([1.0], [True])["ece"][0] == pytest.approx(0.0)
