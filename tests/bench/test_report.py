from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from edgeft.bench.report import RunRecord, flat, joint_hits, render
from edgeft.bench.table import FIELDS, SPEED_FIELDS, make_row
from tests.bench.report_record import full_record, history, hit_rows, package, record, svm

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Fails on unbalanced tags; keeps text, attributes and titles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(text)

    def says(self, text: str) -> bool:
        return text in re.sub(r"\s+", " ", "".join(self.text))


def test_the_page_is_well_formed_and_holds_every_part() -> None:
    page = Page(render(record()))
    parts = ("All packages", "Accuracy against size, speed and memory", "Learning curves", "Merge", "Data", "Host")
    for part in (*parts, "What was not measured", "Artifacts", "Where it still errs"):
        assert page.says(part), part
    assert sum(tag == "figure" for tag, _ in page.tags) == 4
    for text in ("Test CPU", "16,000 MB", "2,981", "3 rows differ", "no cpufreq", "runs/train-1", "cdcdcdcdcdcdcdcd"):
        assert page.says(text), text


def test_latency_ladder_slices_and_conditions_are_shown_where_they_were_measured() -> None:
    page = Page(render(full_record()))
    assert sum(tag == "figure" for tag, _ in page.tags) == 10
    for text in ("All 320 timed decoding steps", "source = phone", "75% of 40", "15 of 16", "others_share", "1e-06"):
        assert page.says(text), text
    linked = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert linked == {
        f"#{attributes['id']}" for tag, attributes in page.tags if tag == "section" and "id" in attributes
    }


def test_confusions_and_held_answers_are_shown() -> None:
    page = render(full_record())
    assert "<title>cancel: return, 1</title>" in page
    assert "<td>teacher gguf q4_k_m</td><td>json valid</td><td>50</td><td>94.0% (83.8-97.9)</td>" in page
    assert "<td>100.0% (92.9-100.0)</td><td>0.25</td>" in page
    assert "held to a grammar" not in render(record())


def test_the_page_needs_no_network() -> None:
    html = render(record())
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not any(name in ("src", "srcset") for _, attributes in page.tags for name in attributes)
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in page.tags)  # within the page alone
    assert "url(" not in html and "@import" not in html


def test_headlines_are_computed_from_the_rows() -> None:
    assert Page(render(record())).says("94.6%of the teacher's joint exact match")
    worse = [package("student", "gguf", "q8_0", 44, 87, 260), package("teacher", "gguf", "q8_0", 88, 145, 150)]
    assert Page(render(record(rows=worse))).says("50.0%of the teacher's joint exact match")


def test_an_absent_figure_is_a_dash_that_says_why() -> None:
    page = Page(render(record()))
    reasons = {attributes.get("title") for tag, attributes in page.tags if tag == "abbr"}
    assert reasons == {"left out in this test", "a classifier is no package"}
    assert page.says("svm: ")
    assert page.says("a classifier is no package")  # on a phone nothing hovers


def test_whole_groups_of_absent_figures_are_named_by_one_word() -> None:
    page = Page(render(record(rows=[svm()])))
    assert page.says("speed and memory")
    assert not page.says(SPEED_FIELDS[3])


def test_every_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    row = {**package(evil, "gguf", "q8_0", 90, 87, 260), "quant": evil, "absent": {"load_s": evil}}
    rows = [{**r, "slices": {"label": evil}} for r in hit_rows(90)]
    html = render(
        record(
            name=evil,
            rows=[row, package("teacher", "gguf", "q8_0", 90, 8, 2)],
            merge={evil: evil},
            dataset={"warnings": {"w": evil}, evil: [evil]},
            host={"cpu": evil, "absent": {evil: evil}},
            artifacts=[dict.fromkeys(("name", "kind", "digest", "path"), evil)],
            curves={evil: history()},
            test_rows={"teacher gguf q8_0": rows},
        )  # fmt: skip
    )
    Page(html)
    assert "<script" not in html
    assert html.count("&lt;script") > 12


def test_a_run_without_student_curves_or_json_still_has_a_page() -> None:
    values = {"name": "teacher", "format": "gguf", "quant": "f16", "bytes": 5, "decode_tps": 1.0, "n": 3}
    row = make_row(values, dict.fromkeys(FIELDS, "no reference answer starts with JSON"))
    page = Page(render(RunRecord(name="bare", rows=[row])))
    assert page.says("bare")
    assert not page.says("Learning curves")
    assert not page.says("Accuracy against size")


def test_weak_labels_are_those_with_misses() -> None:
    page = Page(render(record(rows=[package("teacher", "gguf", "q8_0", 93, 145, 150)])))
    assert page.says("label-9")
    assert not page.says("label-3")


def test_joint_hits_leave_out_rows_without_a_gold_answer() -> None:
    assert joint_hits(
        {"a": [{"joint_correct": True}, {"joint_correct": None}, {"joint_correct": False}], "svm": [{}]}
    ) == {
        "a": [True, False],
        "svm": [],
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": {"b": 1234567}}, [("a.b", "1,234,567")]),
        ({"x_bytes": 5_000_000}, [("x_bytes", "5 MB")]),
        ({"x": [1, "two"], "y": []}, [("x", "1, two"), ("y", "none")]),
        ({"x": True, "y": None, "z": 0.123456}, [("x", "yes"), ("y", "unknown"), ("z", "0.1235")]),
    ],
)
def test_nested_records_become_names_and_texts(value: Any, shown: list[tuple[str, str]]) -> None:
    assert flat(value) == shown
