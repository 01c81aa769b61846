"""Charts with one line per thing, as inline SVG: how values are distributed, and values with their range and limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeft.bench.axes import Scale, fit_scale
from edgeft.bench.svg import LETTER, WIDTH, Element, add, canvas, text_of, write, x_axis

LEFT, RIGHT = 8, WIDTH - 8
TOP, PITCH, FOOT = 8, 34, 46  # the first line's upper edge, a line's height, room for the axis
RIDGE = 19  # height of the highest ridge
BINS = 72
TAIL = 0.5  # percent of all values that may lie beyond either end of the axis


@dataclass(frozen=True)
class Ridge:
    """Values of one thing; `marks` are drawn as ticks, `said` stands at the right of its name."""

    label: str
    said: str
    colour: int
    values: Sequence[float]
    marks: Sequence[float]


@dataclass(frozen=True)
class Range:
    """A value of one thing, the range it has, and what it must not exceed (None: no limit)."""

    label: str
    said: str
    colour: int
    value: float
    low: float
    high: float
    limit: float | None = None
    square: bool = False


def ridges(lines: Sequence[Ridge], x_title: str) -> str:
    """The distribution of each line's values over one logarithmic axis; all values must be above 0.

    Heights are relative to the line's own commonest value. Values beyond the axis are not drawn.
    """
    values = np.concatenate([np.asarray(line.values) for line in lines])
    low, high = np.percentile(values, [TAIL, 100 - TAIL])
    x = fit_scale([float(low), float(high)], LEFT, RIGHT, log=True)
    svg, base = _frame(x, x_title, len(lines))
    edges = np.geomspace(x.low, x.high, BINS + 1)
    for number, line in enumerate(lines):
        foot = TOP + (number + 1) * PITCH - 2.0
        group = _line(svg, line.label, line.said, line.colour, foot)
        heights = _smooth(np.histogram(line.values, edges)[0].astype(np.float64))
        tops = foot - RIDGE * heights / max(heights.max(), 1e-9)
        middles = [x(float(edge)) for edge in np.sqrt(edges[:-1] * edges[1:])]
        outline = " ".join(f"{px:.1f},{py:.1f}" for px, py in zip(middles, tops, strict=True))
        corners = f"{middles[0]:.1f},{foot:.1f} {outline} {middles[-1]:.1f},{foot:.1f}"
        add(group, "polygon", points=corners, **{"class": "ridge"})
        for mark in line.marks:
            at = x(min(max(mark, x.low), x.high))
            add(group, "line", x1=at, x2=at, y1=foot - 7, y2=foot + 2, **{"class": "tick-mark"})
    x_axis(svg, x, base, x_title)
    return text_of(svg)


def ranges(lines: Sequence[Range], x_title: str, log: bool = False, guide: float | None = None) -> str:
    """Each line's value as a mark, its range as a bar, its limit as a tick; `guide`: a value to compare all with.

    With `log` all values must be above 0.
    """
    values = [v for line in lines for v in (line.low, line.high, line.value, line.limit) if v is not None]
    x = fit_scale([*values, *([] if guide is None else [guide])], LEFT, RIGHT, log=log)
    svg, base = _frame(x, x_title, len(lines))
    if guide is not None:
        add(svg, "line", x1=x(guide), x2=x(guide), y1=TOP, y2=base, **{"class": "front"})
    for number, line in enumerate(lines):
        foot = TOP + (number + 1) * PITCH - 2.0
        group, middle = _line(svg, line.label, line.said, line.colour, foot), foot - 8
        add(group, "line", x1=x(line.low), x2=x(line.high), y1=middle, y2=middle, **{"class": "bar"})
        if line.limit is not None:
            add(group, "line", x1=x(line.limit), x2=x(line.limit), y1=middle - 6, y2=middle + 6, **{"class": "limit"})
        if line.square:
            add(group, "rect", x=x(line.value) - 4, y=middle - 4, width=8, height=8, **{"class": "dot"})
        else:
            add(group, "circle", cx=x(line.value), cy=middle, r=4.5, **{"class": "dot"})
    x_axis(svg, x, base, x_title)
    return text_of(svg)


def _frame(x: Scale, x_title: str, num_lines: int) -> tuple[Element, float]:
    """A picture with vertical grid lines, and the height of its axis."""
    base = TOP + num_lines * PITCH + 4.0
    svg = canvas(base + FOOT - 4, x_title)
    for tick in x.ticks():
        add(svg, "line", x1=x(tick), x2=x(tick), y1=TOP, y2=base, **{"class": "grid"})
    return svg, base


def _line(svg: Element, label: str, said: str, colour: int, foot: float) -> Element:
    """One line's name at the left, its figures at the right if both have room, and the group for its marks."""
    group = add(svg, "g", **{"class": f"strip c{colour}"})
    add(group, "title").text = f"{label}: {said}"
    if LETTER * (len(label) + len(said) + 2) > WIDTH:
        label = label[: max(8, int(WIDTH / LETTER) - len(said) - 3)] + "\N{HORIZONTAL ELLIPSIS}"
    write(group, label, LEFT, foot - PITCH + 14, "label name")
    write(group, said, RIGHT, foot - PITCH + 14, "label said", "end")
    return group


def _smooth(heights: np.ndarray) -> np.ndarray:
    """Each bin with half of its neighbours, so that few samples do not look like a comb."""
    padded = np.pad(heights, 1)
    smoothed: np.ndarray = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return smoothed
