"""The picture of a confusion matrix: a cell for every pair that occurs, in its line and column."""

from __future__ import annotations

from xml.etree import ElementTree

from edgeft.bench import figures
from edgeft.bench.matrix import confusion_matrix

MATRIX = {
    "cancel": {"cancel": 9, "return": 1},
    "return": {"(unknown label)": 2, "return": 2},
    "a label that is longer than its place": {"cancel": 1},
}


def test_every_pair_has_a_cell_in_its_line_and_column() -> None:
    svg = ElementTree.fromstring(confusion_matrix(MATRIX))
    cells = {cell.findtext("title"): cell for cell in svg.iter("rect")}
    assert set(cells) == {
        "cancel: cancel, 9", "cancel: return, 1", "return: return, 2", "return: (unknown label), 2",
        "a label that is longer than its place: cancel, 1",
    }  # fmt: skip
    right, wrong, below, last, longest = (cells[t] for t in sorted(cells, key=lambda t: place(cells[t])[::-1]))
    assert place(right)[1] == place(wrong)[1] < place(below)[1] == place(last)[1] < place(longest)[1]
    assert place(right)[0] == place(longest)[0] < place(wrong)[0] == place(below)[0] < place(last)[0]
    assert [cell.get("class") for cell in (right, wrong, below, last, longest)] == ["c0", "c1", "c0", "c1", "c1"]
    strengths = [float(str(cell.get("fill-opacity"))) for cell in (wrong, below, right, longest)]
    assert strengths == sorted(strengths) and strengths[-1] == 1
    assert "a label that is lon…" in [text.text for text in svg.iter("text")]


def test_labels_are_escaped() -> None:
    assert "<b>" not in confusion_matrix({"<b>": {"&": 1}})


def test_there_is_no_picture_where_nothing_was_taken_for_another() -> None:
    assert figures.confusion({"a": {"a": 3}}) is None and figures.confusion({}) is None
    assert figures.confusion(MATRIX)


def place(cell: ElementTree.Element) -> tuple[float, float]:
    return float(str(cell.get("x"))), float(str(cell.get("y")))
