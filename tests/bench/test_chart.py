from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from edgeft.bench.chart import BOTTOM, LEFT, RIGHT, TOP, Point, learning_curve, moving_average, pareto_front, scatter


def point(x: float, y: float, label: str = "p", **more: Any) -> Point:
    values = {"low": y - 2, "high": y + 2, "title": label, "colour": 0, "square": False, **more}
    return Point(x, y, label=label, **values)


def classes(svg: str, name: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if name in e.get("class", "").split()]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("text")]


def test_the_front_holds_what_no_other_point_beats_in_both() -> None:
    small_good, big_better, big_worse, small_bad = point(1, 90), point(9, 95), point(10, 94), point(1, 80)
    points = [big_worse, small_bad, big_better, small_good]
    assert pareto_front(points, small_x=True) == [small_good, big_better]
    assert pareto_front(points, small_x=False) == [big_better, big_worse]


def test_equal_points_do_not_both_stand_on_the_front() -> None:
    assert len(pareto_front([point(1, 90), point(1, 90), point(2, 90)], small_x=True)) == 1


def test_a_scatter_plot_rings_its_front_and_draws_every_interval() -> None:
    svg = scatter([point(50, 90, "a"), point(100, 95, "b"), point(200, 93, "c")], "MB", "%", small_x=True, log_x=True)
    assert len(classes(svg, "point")) == 3
    assert len(classes(svg, "ring")) == 2
    assert len(classes(svg, "bar")) == 3
    assert {"a", "b", "c", "MB", "%"} <= set(texts(svg))


def test_points_lie_inside_the_plot_and_one_far_below_stands_at_its_foot_with_its_value() -> None:
    points = [point(50, 90), point(100, 99.5, high=100), point(120, 4, "floor", square=True)]
    svg = scatter(points, "MB", "%", small_x=True, log_x=True)
    for dot in classes(svg, "dot"):
        x = float(dot.get("cx") or dot.get("x") or 0)
        y = float(dot.get("cy") or dot.get("y") or 0)
        assert LEFT <= x <= RIGHT
        assert TOP <= y <= BOTTOM
    assert "floor 4% \N{DOWNWARDS ARROW}" in texts(svg)
    assert len(classes(svg, "bar")) == 2


def test_labels_never_cover_each_other() -> None:
    crowd = [point(100 + i, 90 + i / 10, f"label{i}") for i in range(12)]
    svg = scatter(crowd, "MB", "%", small_x=True, log_x=True)
    placed = [(float(e.get("x", 0)), float(e.get("y", 0))) for e in classes(svg, "label")]
    assert 0 < len(placed) < 12  # the others are left to the hover text
    assert len(list(ElementTree.fromstring(svg).iter("title"))) == 12
    for i, (x, y) in enumerate(placed):
        assert all(abs(x - a) >= 30 or abs(y - b) >= 10 for a, b in placed[:i])


def test_one_point_alone_can_be_drawn() -> None:
    assert len(classes(scatter([point(5, 0, low=0, high=3)], "x", "y", small_x=False, log_x=False), "dot")) == 1


def test_a_learning_curve_marks_the_kept_step() -> None:
    steps = [{"step": i, "loss": 2.0 / i, "lr": 0.1} for i in range(1, 101)]
    svg = learning_curve(steps, [{"step": 50, "loss": 0.2}, {"step": 100, "loss": 0.3}], best_step=50, window=5)
    (best,) = classes(svg, "best")
    assert best[0].text == "validation loss 0.2000 at step 50 (kept)"
    assert "kept: 0.200" in texts(svg)
    assert any("log scale" in text for text in texts(svg))


def test_a_flat_curve_starts_its_axis_at_zero() -> None:
    svg = learning_curve([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}], [], best_step=0, window=1)
    assert "0" in texts(svg)
    assert not any("log scale" in text for text in texts(svg))


def test_the_moving_average_looks_back_and_never_ahead() -> None:
    curve = [(1.0, 4.0), (2.0, 2.0), (3.0, 0.0), (4.0, 10.0)]
    assert moving_average(curve, 2) == [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0), (4.0, 5.0)]


def test_markup_in_a_label_stays_text() -> None:
    svg = scatter([point(5, 50, "<script>&")], "x", "y", small_x=True, log_x=False)
    assert "<script>" not in svg
    assert "<script>&" in texts(svg)
