from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from edgeft.bench.compare import alternate, as_cells, compare_plain, compare_rows, compare_speeds
from edgeft.bench.gates import Gate, judge, load_gates
from edgeft.bench.stats import bootstrap_difference, mcnemar_exact, median_ratio
from edgeft.cli import main
from edgeft.errors import DataError, RecipeError


def rows(hits: list[bool], **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "joint_correct": hit, "intent_correct": True, "json_valid": True, "chrf": 50.0 + hit,
         "nll": 0.5 - 0.1 * hit, "num_answer_tokens": 10, "slices": {"label": "x"}, **more}
        for i, hit in enumerate(hits)
    ]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (20, 21), (5, 40)])
def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected)


def test_the_same_answers_do_not_differ() -> None:
    found = {one.figure: one for one in compare_rows(rows([True, False] * 20), rows([True, False] * 20))}
    assert found["joint_exact_match"].change == (0.0, 0.0, 0.0)
    assert found["joint_exact_match"].p == 1.0
    assert found["perplexity"].change == (1.0, 1.0, 1.0)


def test_paired_rows_show_a_difference_that_two_intervals_would_hide() -> None:
    old = [i % 2 == 0 for i in range(200)]
    new = [hit or i < 20 for i, hit in enumerate(old)]  # ten more right, none lost
    found = {one.figure: one for one in compare_rows(rows(old), rows(new))}
    joint = found["joint_exact_match"]
    assert (joint.first, joint.second) == (0.5, 0.55)
    assert joint.change is not None and joint.change[1] > 0
    assert joint.p == pytest.approx(2 / 2**10)
    assert "0 rows right in A alone, 10 in B alone" in joint.detail
    assert found["perplexity"].second < found["perplexity"].first
    assert as_cells(joint)[3].startswith("+0.05 (+")


def test_other_rows_are_refused_with_the_first_that_differs() -> None:
    with pytest.raises(DataError, match="40 test rows, B on 39"):
        compare_rows(rows([True] * 40), rows([True] * 39))
    other = rows([True] * 40)
    other[7]["id"] = "someone-else"
    with pytest.raises(DataError, match=r"row 8 is 'r7' .* 'someone-else'"):
        compare_rows(rows([True] * 40), other)


def test_a_floor_that_finds_no_fields_is_compared_by_what_it_has() -> None:
    floor = [{**row, "joint_correct": None, "json_valid": None} for row in rows([True] * 9)]
    for pair in ((rows([True] * 9), floor), (floor, rows([True] * 9))):
        found = {one.figure for one in compare_rows(*pair)}
        assert "intent_accuracy" in found and not {"joint_exact_match", "json_valid"} & found


def test_other_tokens_leave_perplexity_out() -> None:
    found = compare_rows(rows([True] * 9), rows([True] * 9, num_answer_tokens=12))
    assert "perplexity" not in {one.figure for one in found}


def test_processes_alternate_and_who_begins_changes() -> None:
    order: list[str] = []

    def measure(side: str) -> dict[str, float]:
        order.append(side)
        return {"decode_tps": 100.0 if side == "A" else 150.0, "prefill_tps": 1.0, "ttft_s": 1.0, "peak_rss_bytes": 1.0}

    runs = alternate(measure, 3)
    assert "".join(order) == "ABBAAB"
    [decode, *_] = compare_speeds(runs)
    assert decode.change == (1.5, 1.5, 1.5) and decode.detail == "3 processes each, in turns"
    runs["B"][1]["marks"] = ["busy: others took 50% of the time of 2 threads"]
    assert compare_speeds(runs)[0].detail == "3 processes each, in turns, 1 of them disturbed"


def test_a_ratio_of_noisy_repeats_has_an_interval_around_it() -> None:
    value, low, high = median_ratio([100, 110, 90, 105, 95], [200, 220, 180, 210, 190])
    assert low < value == 2.0 < high


def test_a_weighted_difference_weighs_rows() -> None:
    value, _, _ = bootstrap_difference([0.0, 0.0], [1.0, 0.0], [3, 1])
    assert value == 0.75


def test_single_readings_are_shown_without_a_test() -> None:
    found = compare_plain({"bytes": 10, "ece": (0.1, 0.0, 0.2)}, {"bytes": 5, "ece": (0.2, 0.0, 0.3)}, but=["load_s"])
    assert [(one.figure, one.first, one.second, one.change) for one in found] == [
        ("bytes", 10.0, 5.0, None), ("ece", 0.1, 0.2, None),
    ]  # fmt: skip


def gate_file(folder: Path, text: str) -> Path:
    (folder / "gates.yaml").write_text(text)
    return folder / "gates.yaml"


def test_limits_are_kept_or_not() -> None:
    figures = {"joint_exact_match": (0.92, 0.90), "decode_tps": (100.0, 94.0), "bytes": (10.0, 10.0)}
    gates = {"joint_exact_match": Gate(max_drop=0.02, minimum=0.91), "decode_tps": Gate(min_ratio=0.95),
             "bytes": Gate(max_ratio=1.0, max_rise=0)}  # fmt: skip
    kept = {(v.figure, v.limit): v.kept for v in judge(gates, figures)}
    assert kept == {
        ("joint_exact_match", "max_drop"): True, ("joint_exact_match", "minimum"): False,
        ("decode_tps", "min_ratio"): False, ("bytes", "max_ratio"): True, ("bytes", "max_rise"): True,
    }  # fmt: skip


def test_a_gate_file_is_read(tmp_path: Path) -> None:
    path = gate_file(tmp_path, "joint_exact_match: {max_drop: 0.02}\nbytes: {max_ratio: 1}\n")
    assert load_gates(path, {"joint_exact_match", "bytes"})["bytes"].max_ratio == 1.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("joint: {max_drop: 0.02}", "unknown figures joint"),
        ("bytes: {max_dorp: 1}", r"bytes\.max_dorp: Extra"),
        ("bytes: {}", "names no limit"),
        ("bytes: {max_drop: -1}", "greater than or equal to 0"),
        ("- bytes", "not a gate file"),
        ("bytes: {max_drop", "not valid YAML"),
        ("{}", "no gate in it"),
    ],
)
def test_a_wrong_gate_file_is_explained(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_gates(gate_file(tmp_path, text), {"bytes"})


def test_a_mistake_in_a_gate_file_is_said_before_anything_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gate_file(tmp_path, "bytes: {max_ratio: much}")
    with pytest.raises(SystemExit) as stop:
        main(["compare", "no-such-a", "no-such-b", "--gate", str(path)])
    assert stop.value.code == 2
    assert "not a gate file" in capsys.readouterr().err
