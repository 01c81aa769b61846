"""Charts as inline SVG: learning curves and scatter plots with a Pareto front. Colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgeft.bench.axes import Scale, fit_scale, tick_text
from edgeft.bench.svg import LETTER, WIDTH, Element, add, canvas, text_of, write, x_axis

HEIGHT = 310
LEFT, RIGHT, TOP, BOTTOM = 40, 390, 30, 268  # the plot's edges
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """One package in a scatter plot; `low` and `high` bound its 95% interval in y."""

    x: float
    y: float
    low: float
    high: float
    label: str
    title: str  # shown on hover
    colour: int  # number of the model: CSS class c0, c1, ...
    square: bool  # the mark: a square or a circle


def pareto_front(points: Sequence[Point], small_x: bool) -> list[Point]:
    """The points that no other one beats in both, by x; `small_x`: a small x is the better one. y is better high."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x if small_x else -p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return sorted(front, key=lambda p: p.x)


def scatter(points: Sequence[Point], x_title: str, y_title: str, small_x: bool, log_x: bool) -> str:
    """y against x as SVG. Points far below the others are drawn at the foot of the plot with their value."""
    near = [p for p in points if p.y >= max(q.y for q in points) / 2]
    bounds = [bound for p in near for bound in (p.low, p.high)]
    x = fit_scale([p.x for p in points], LEFT, RIGHT, log=log_x, zero=not log_x)
    low = max(0.0, 5 * (min(bounds) // 5) - 1)
    y = Scale(low, min(101.0, max(bounds) + 2), BOTTOM, TOP)
    svg = _frame(x, y, x_title, y_title)
    front = pareto_front(points, small_x)
    _front_line(svg, [p for p in front if p.y >= low], x, y, small_x)
    boxes: list[Box] = []
    for p in points:
        px, py = x(p.x), min(y(p.y), BOTTOM - 6.0)
        reach = 9 if p in front else 5
        boxes += [(px - reach, py - reach, px + reach, py + reach)]
        if p.y >= low:
            boxes += [(px - 1, y(p.high), px + 1, y(max(p.low, low)))]
        _mark(svg, p, px, py, y, low, p in front)
    for p in sorted(points, key=lambda p: p not in front):
        text = p.label if p.y >= low else f"{p.label} {p.y:.0f}% \N{DOWNWARDS ARROW}"
        _label(svg, text, x(p.x), min(y(p.y), BOTTOM - 6.0), boxes)
    return text_of(svg)


def learning_curve(
    steps: Sequence[dict[str, float]], evals: Sequence[dict[str, float]], best_step: float, window: int
) -> str:
    """Training loss (single steps faint, moving average over `window` steps strong) and validation points as SVG."""
    train = [(s["step"], s["loss"]) for s in steps]
    smooth = moving_average(train, window)
    checks = [(e["step"], e["loss"]) for e in evals]
    losses = [loss for _, loss in (*train, *checks)]
    wide = min(losses) > 0 and max(losses) / min(losses) > 8
    x = Scale(0, max(step for step, _ in (*train, *checks)) or 1, LEFT, RIGHT)
    y = fit_scale(losses, BOTTOM, TOP, log=wide, zero=not wide)
    svg = _frame(x, y, "optimiser step", "loss, nats per answer token" + (" (log scale)" if wide else ""))
    for name, curve in (("raw", train), ("smooth", smooth), ("checks", checks)):
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in _thinned(curve))
        add(svg, "polyline", points=points, **{"class": f"curve {name}"})
    for check in evals:
        step, loss, best = check["step"], check["loss"], check["step"] == best_step
        look = {"class": "check best" if best else "check"}
        dot = add(svg, "circle", cx=x(step), cy=y(loss), r=5 if best else 3.2, **look)
        right_lines = f", {check['exact_match']:.1%} of first lines right" if "exact_match" in check else ""
        kept = " (kept)" if best else ""
        add(dot, "title").text = f"validation loss {loss:.4f}{right_lines} at step {step:.0f}{kept}"
        if best:
            right = x(step) < RIGHT - 90
            look = {"class": "label", "text-anchor": "start" if right else "end"}
            note = add(svg, "text", x=x(step) + (8 if right else -8), y=y(loss) + 17, **look)
            note.text = f"kept: {loss:.3f}"
    return text_of(svg)


def timeline(lines: Sequence[Sequence[tuple[float, float]]], y_title: str, names: Sequence[str]) -> str:
    """One line per series, coloured in turn, as SVG; x is the number of a measurement, `names` their dates (hover)."""
    values = [value for line in lines for _, value in line]
    x = Scale(-0.5, len(names) - 0.5, LEFT, RIGHT)
    y = fit_scale(values, BOTTOM, TOP)
    svg = _frame(Scale(0, 1, LEFT, RIGHT), y, "", y_title, ticks=False)
    write(svg, names[0][:10], LEFT, BOTTOM + 17, "tick")
    write(svg, names[-1][:10], RIGHT, BOTTOM + 17, "tick", "end")
    for number, line in enumerate(lines):
        group = add(svg, "g", **{"class": f"c{number % 6}"})
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in line)
        add(group, "polyline", points=points, **{"class": "curve"})
        for at, value in line:
            dot = add(group, "circle", cx=x(at), cy=y(value), r=3.5, **{"class": "dot"})
            add(dot, "title").text = f"{names[int(at)]}: {value:,.4g}"
    return text_of(svg)


def moving_average(curve: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean of up to `window` values that end at each step."""
    smooth, total = [], 0.0
    for i, (step, value) in enumerate(curve):
        total += value - (curve[i - window][1] if i >= window else 0.0)
        smooth.append((step, total / min(i + 1, window)))
    return smooth


def _thinned(curve: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    every = -(-len(curve) // most) or 1
    return [*curve[::every], *([curve[-1]] if curve and (len(curve) - 1) % every else [])]


def _frame(x: Scale, y: Scale, x_title: str, y_title: str, ticks: bool = True) -> Element:
    """An SVG with grid, ticks (in x if `ticks`) and axis titles."""
    svg = canvas(HEIGHT, f"{y_title} against {x_title}" if x_title else f"{y_title} over time")
    for tick in y.ticks():
        add(svg, "line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), **{"class": "grid"})
        write(svg, tick_text(tick), LEFT - 6, y(tick) + 4, "tick", "end")
    x_axis(svg, x, BOTTOM, x_title, ticks)
    write(svg, y_title, 2, 14, "title")
    return svg


def _front_line(svg: Element, front: Sequence[Point], x: Scale, y: Scale, small_x: bool) -> None:
    """Stairs through the front: what is reachable at each x."""
    if len(front) < 2:
        return
    corners = [(x(front[0].x), y(front[0].y))]
    for before, after in pairwise(front):
        corners += [(x(after.x), y(before.y)) if small_x else (x(before.x), y(after.y)), (x(after.x), y(after.y))]
    add(svg, "polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners), **{"class": "front"})


def _mark(svg: Element, p: Point, px: float, py: float, y: Scale, low: float, on_front: bool) -> None:
    group = add(svg, "g", **{"class": f"point c{p.colour}" + (" on-front" if on_front else "")})
    add(group, "title").text = p.title
    if p.y >= low:
        add(group, "line", x1=px, x2=px, y1=y(p.high), y2=y(max(p.low, low)), **{"class": "bar"})
    if on_front:
        add(group, "circle", cx=px, cy=py, r=9, **{"class": "ring"})
    if p.square:
        add(group, "rect", x=px - 4.5, y=py - 4.5, width=9, height=9, **{"class": "dot"})
    else:
        add(group, "circle", cx=px, cy=py, r=5, **{"class": "dot"})


def _label(svg: Element, text: str, px: float, py: float, taken: list[Box]) -> None:
    """Write `text` beside a point where it covers nothing; leave it out if there is no such place (hover shows it)."""
    width = LETTER * len(text)
    places = [(px + 11, py + 4), (px - 11 - width, py + 4), (px - width / 2, py - 13), (px - width / 2, py + 21),
              (px + 8, py - 10), (px + 8, py + 18), (px - 8 - width, py - 10), (px - 8 - width, py + 18)]  # fmt: skip
    for left, base in places:
        box = (left, base - 8, left + width, base + 2)
        inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= TOP - 12 and box[3] <= BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            add(svg, "text", x=left, y=base, **{"class": "label"}).text = text
            return


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
