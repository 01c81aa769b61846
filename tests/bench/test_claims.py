from __future__ import annotations

from typing import Any

from edgeft.bench.claims import claims, pair, pick
from edgeft.bench.stats import wilson
from edgeft.bench.table import FIELDS, make_row

HITS = {"teacher gguf q8_0": [True] * 90 + [False] * 10, "student gguf q8_0": [True] * 81 + [False] * 19}


def row(name: str, quant: str | None = "q8_0", hits: int | None = None, **values: Any) -> dict[str, Any]:
    fmt = "gguf" if quant else None
    made = {"name": name, "format": fmt, "quant": quant, "n": 100, "n_json": 100, **values}
    if hits is not None:
        made["joint_exact_match"] = wilson(hits, 100)
    return make_row(made, dict.fromkeys(FIELDS, "not measured"))


TEACHER = row("teacher", hits=90, bytes=200_000_000, decode_tps=100.0, intent_accuracy=wilson(95, 100))
STUDENT = row("student", hits=81, bytes=120_000_000, decode_tps=170.0, intent_accuracy=wilson(93, 100))


def said(rows: list[dict[str, Any]], **hits: list[bool]) -> dict[str, str]:
    return {claim.what: f"{claim.value} | {claim.detail}" for claim in claims(rows, hits)}


def test_the_student_is_compared_with_the_teacher_in_the_same_kind_of_package() -> None:
    found = said([TEACHER, STUDENT], **HITS)
    share = found["of the teacher's joint exact match is kept by the student"]
    assert share.startswith("90.0% | 81.0% against 90.0%, n = 100, both gguf q8_0")
    assert found["the teacher's size"].startswith("0.60 × |")
    assert found["the teacher's decode speed"].startswith("1.70 × |")


def test_the_kept_share_has_a_paired_interval_when_rows_are_there() -> None:
    share = said([TEACHER, STUDENT], **HITS)["of the teacher's joint exact match is kept by the student"]
    low, high = share.split("interval of the ratio ")[1].split("%")[0].split("-")
    assert 80 < float(low) < 90 < float(high) < 98
    without = said([TEACHER, STUDENT])["of the teacher's joint exact match is kept by the student"]
    assert "interval" not in without


def test_different_packages_are_not_compared() -> None:
    assert pair([TEACHER, row("student", "q4_k_m", hits=80)]) is None
    assert "the teacher's size" not in said([TEACHER, row("student", "q4_k_m", hits=80, bytes=1)])


def test_q8_0_is_compared_before_any_other_package() -> None:
    both = pair([row("teacher", "f16"), row("student", "f16"), STUDENT, TEACHER])
    assert both == (STUDENT, TEACHER)


def test_the_pick_is_the_smallest_inside_the_interval_of_the_best() -> None:
    good = row("student", "q4_k_m", hits=86, bytes=80_000_000)  # 90 of 100: the interval starts at 82.6%
    small_but_worse = row("student", "q4_0", hits=82, bytes=60_000_000)
    assert pick([TEACHER, good, small_but_worse], {}) == good


def test_the_pick_goes_by_the_same_rows_where_they_are_there() -> None:
    """Nine rows lost and none won is a difference that the two intervals would hide."""
    small = row("student", "q4_k_m", hits=86, bytes=80_000_000)
    best, lost = [True] * 90 + [False] * 10, [True] * 81 + [False] * 19
    evenly = [True] * 81 + [False] * 9 + [True] * 5 + [False] * 5  # nine lost, five won
    key = "student gguf q4_k_m"
    assert pick([TEACHER, small], {"teacher gguf q8_0": best, key: lost}) == TEACHER
    assert pick([TEACHER, small], {"teacher gguf q8_0": best, key: evenly}) == small


def test_a_floor_is_never_picked() -> None:
    assert pick([row("base_fewshot", hits=99, bytes=1)], {}) is None
    assert pick([TEACHER, row("base_fewshot", hits=99, bytes=1)], {}) == TEACHER


def test_models_that_never_answer_right_are_not_picked() -> None:
    assert pick([row("teacher", hits=0, bytes=2), row("student", hits=0, bytes=1)], {}) is None


def test_floors_are_told_beside_the_pick() -> None:
    floors = [
        row("base_fewshot", hits=5, conditions={"few_shot": 12}),
        row("svm", None, intent_accuracy=wilson(88, 100)),
    ]
    found = said([TEACHER, *floors])
    assert found["joint exact match of the untouched base model with 12 examples in its prompt"].startswith("5.0% | ")
    svm = next(text for what, text in found.items() if "linear classifier" in what)
    assert svm.startswith("88.0% | teacher gguf q8_0: 95.0%")


def test_nothing_measured_means_nothing_claimed() -> None:
    assert claims([row("teacher"), row("student"), row("svm", None)], {}) == []
    assert claims([], {}) == []


def test_a_teacher_without_a_hit_is_no_denominator() -> None:
    found = said([row("teacher", hits=0, bytes=2, decode_tps=1.0), row("student", hits=0, bytes=1, decode_tps=1.0)])
    assert not any("kept by the student" in what for what in found)
