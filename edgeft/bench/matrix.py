"""A confusion matrix as inline SVG: a line per right label, a column per label that the model gave."""

from __future__ import annotations

from collections.abc import Mapping

from edgeft.bench.svg import LETTER, WIDTH, Element, add, canvas, text_of, write

TOP, PITCH = 6, 13  # the first line's upper edge, a line's height
NAME = 20  # letters of a label that are shown; all of them show on hover
FAINTEST = 0.25  # opacity of a cell that holds next to none of its line's rows


def confusion_matrix(matrix: Mapping[str, Mapping[str, int]]) -> str:
    """`matrix`: {right label: {given label: rows}}. Columns stand in the order of the lines, what is no label last."""
    labels = list(matrix)
    others = sorted({said for row in matrix.values() for said in row} - set(labels))
    left = LETTER * NAME + 6
    width = (WIDTH - left) / len(labels + others)
    svg = canvas(TOP + PITCH * len(labels) + 4, "confusion matrix")
    for line, (gold, row) in enumerate(matrix.items()):
        y = TOP + PITCH * line
        write(svg, gold if len(gold) <= NAME else f"{gold[: NAME - 1]}…", left - 6, y + 10, "tick", "end")
        add(svg, "line", x1=left, x2=WIDTH, y1=y + PITCH, y2=y + PITCH, **{"class": "grid"})
        for column, said in enumerate(labels + others):
            if number := row.get(said, 0):
                share = number / sum(row.values())
                _cell(svg, left + width * column, y, width, share, gold == said, f"{gold}: {said}, {number}")
    return text_of(svg)


def _cell(svg: Element, x: float, y: float, width: float, share: float, right: bool, title: str) -> None:
    opacity = f"{FAINTEST + (1 - FAINTEST) * share:.2f}"
    look = {"class": "c0" if right else "c1", "fill": "currentColor", "fill-opacity": opacity}
    cell = add(svg, "rect", x=x, y=y + 1.0, width=width - 0.5, height=PITCH - 2.0, **look)
    add(cell, "title").text = title
