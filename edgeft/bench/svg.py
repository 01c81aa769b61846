"""What all charts are made of: elements, grid and axes of an inline SVG. Colours and fonts come from the page's CSS."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from edgeft.bench.axes import Scale, tick_text

WIDTH = 400  # units, about the pixels of a phone's page: text keeps its size there, and grows on a wide screen
LETTER = 7.2  # width of a label's letter on a phone, about
Element = ElementTree.Element


def canvas(height: float, name: str) -> Element:
    """An empty picture of `height` units; `name` is what a screen reader says."""
    return Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": name})


def add(parent: Element, tag: str, **attributes: Any) -> Element:
    """A new child; numbers are rounded to a tenth of a unit."""
    texts = {key: f"{v:.1f}" if isinstance(v, float) else str(v) for key, v in attributes.items()}
    return ElementTree.SubElement(parent, tag, texts)


def write(parent: Element, text: str, x: float, y: float, look: str, anchor: str = "start") -> None:
    """A line of text of the CSS class `look`."""
    add(parent, "text", x=x, y=y, **{"class": look, "text-anchor": anchor}).text = text


def x_axis(svg: Element, x: Scale, base: float, title: str, ticks: bool = True) -> None:
    """The line at height `base`, its ticks (left out where their texts would touch) and its title below."""
    free = float("-inf")
    for tick in x.ticks() if ticks else ():
        add(svg, "line", x1=x(tick), x2=x(tick), y1=base, y2=base + 4, **{"class": "axis"})
        half = LETTER * len(tick_text(tick)) / 2
        at = min(x(tick), WIDTH - half)
        if at - half > free:
            write(svg, tick_text(tick), at, base + 17, "tick", "middle")
            free = at + half + 4
    add(svg, "line", x1=x.start, x2=x.end, y1=base, y2=base, **{"class": "axis"})
    write(svg, title, x.end, base + 36, "title", "end")


def text_of(svg: Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
