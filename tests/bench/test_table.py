from __future__ import annotations

from typing import Any

import pytest

from edgeft.bench.table import FIELDS, cell, in_order, interval, make_row, name_of_input, text_table


def row(
    name: str | None = "teacher", fmt: str | None = "gguf", quant: str | None = "q8_0", **values: Any
) -> dict[str, Any]:
    return make_row({"name": name, "format": fmt, "quant": quant, **values}, dict.fromkeys(FIELDS, "not measured"))


def test_every_field_stands_in_every_row_and_every_null_has_a_reason() -> None:
    made = row(bytes=5)
    assert list(made) == [*FIELDS, "absent"]
    assert made["absent"]["decode_tps"] == "not measured"
    assert "bytes" not in made["absent"]


def test_a_null_without_a_reason_is_refused() -> None:
    with pytest.raises(ValueError, match=r"absent without a reason: .*decode_tps"):
        make_row({"name": "x"}, {"bytes": "because"})


def test_a_measured_zero_is_no_null() -> None:
    assert row(kl_mean=0.0)["kl_mean"] == 0.0
    assert "kl_mean" not in row(kl_mean=0.0)["absent"]


@pytest.mark.parametrize(
    ("input_name", "fmt", "quant", "name"),
    [
        ("bench-student-onnx-int4", "onnx", "int4", "student"),
        ("bench-base_fewshot-gguf-q8_0", "gguf", "q8_0", "base_fewshot"),
        ("bench-svm", None, None, "svm"),
    ],
)
def test_the_name_is_that_of_the_input(input_name: str, fmt: str | None, quant: str | None, name: str) -> None:
    assert name_of_input(input_name, row(None, fmt, quant)) == name


def test_rows_stand_teacher_first_and_large_before_small() -> None:
    rows = [row("svm", None, None), row("student", bytes=1), row("teacher", "onnx", "int4", bytes=1),
            row("teacher", bytes=1), row("teacher", "gguf", "f16", bytes=9), row("base_fewshot")]  # fmt: skip
    order = [(r["name"], r["format"], r["quant"]) for r in in_order(rows)]
    assert order == [
        ("teacher", "gguf", "f16"), ("teacher", "gguf", "q8_0"), ("teacher", "onnx", "int4"),
        ("student", "gguf", "q8_0"), ("base_fewshot", "gguf", "q8_0"), ("svm", None, None),
    ]  # fmt: skip


def test_figures_are_shown_in_the_unit_of_their_column() -> None:
    columns, body = text_table([row(bytes=144_811_776, ttft_s=0.25, joint_exact_match=(0.9, 0.861, 0.929))])
    shown = dict(zip(columns, body[0], strict=True))
    assert shown["size MB"] == "144.8"
    assert shown["TTFT ms"] == "250"
    assert shown["joint exact %"] == "90.0 (86.1-92.9)"
    assert shown["decode tok/s"] == "—"
    assert shown["package"] == "gguf q8_0"


def test_perplexity_finds_its_interval_in_its_own_field() -> None:
    made = row(perplexity=1.5, perplexity_95=(1.25, 1.75))
    assert (cell(made, "perplexity", 1, 2), interval(made, "perplexity", 1, 2)) == ("1.50", "1.25-1.75")
    assert interval(row(), "perplexity") == ""
