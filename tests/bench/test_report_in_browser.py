"""The report in a real browser: on a wide screen, on a phone, in the dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeft.bench.report import render
from tests.bench.report_record import full_record
from tests.chromium import chromium

PHONE, WIDE = 390, 1280
SMALLEST_TEXT = 10  # CSS pixels

# What does not fit: elements that stand out of the page, texts of charts that are too small, charts without a size.
LOOK = """() => ({
  width: document.documentElement.scrollWidth,
  pictures: [...document.querySelectorAll('figure svg')].map((svg) => svg.getBoundingClientRect().height),
  letters: [...document.querySelectorAll('figure svg text')].map((text) =>
    parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a),
  cut: [...document.querySelectorAll('figure svg text')].filter((text) => {
    const inner = text.getBoundingClientRect(), outer = text.closest('figure').getBoundingClientRect();
    return inner.left < outer.left || inner.right > outer.right;
  }).map((text) => text.textContent),
  boxes: [...document.querySelectorAll('.scroll')].filter((box) => box.scrollWidth > box.clientWidth).length,
  paper: getComputedStyle(document.body).backgroundColor,
})"""


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page looks like per screen, with all that the browser asked for and complained of."""
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(full_record()), "utf-8")
    found: dict[str, Any] = {"requests": [], "problems": []}
    with chromium() as browser:
        for name, width, scheme in (("wide", WIDE, "light"), ("phone", PHONE, "light"), ("dark", PHONE, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page.on("request", lambda request: found["requests"].append(request.url))
            page.on("console", lambda message: found["problems"].append(message.text))
            page.on("pageerror", lambda error: found["problems"].append(str(error)))
            page.goto(path.as_uri(), wait_until="load")
            found[name] = page.evaluate(LOOK)
    found["own"] = path.as_uri()
    return found


def test_the_page_asks_for_nothing_but_itself_and_the_console_stays_empty(looks: dict[str, Any]) -> None:
    assert looks["requests"] == [looks["own"]] * 3
    assert looks["problems"] == []


def test_no_page_scrolls_sideways_and_wide_tables_scroll_in_their_own_box(looks: dict[str, Any]) -> None:
    assert looks["phone"]["width"] == looks["dark"]["width"] == PHONE
    assert looks["wide"]["width"] == WIDE
    assert looks["phone"]["boxes"] >= 2


def test_every_chart_is_drawn_and_can_be_read_on_a_phone(looks: dict[str, Any]) -> None:
    assert len(looks["phone"]["pictures"]) == 10
    assert min(looks["phone"]["pictures"]) > 100
    assert min(looks["phone"]["letters"]) >= SMALLEST_TEXT
    assert looks["phone"]["cut"] == looks["wide"]["cut"] == []


def test_a_dark_screen_gets_a_dark_page(looks: dict[str, Any]) -> None:
    assert looks["dark"]["paper"] == "rgb(22, 24, 28)" != looks["phone"]["paper"]
