"""Charts of points that carry their own labels: quality against what it costs, and the roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.report.charts import CHARACTER, colour
from edgemix.report.drawing import data
from edgemix.report.palette import light

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgemix.report.drawing import Canvas

LINE = 16
"""Height of a label, in pixels."""
_MARGIN = 46
"""Roughly what the vertical axis takes of a canvas."""


@dataclass(frozen=True, slots=True)
class Point:
    """One thing, and where it stands: `x` a cost or rate, `y` bits per byte.

    Attributes:
        shape: Of the mark: "circle" for members, "diamond" for the student, "square" for mixtures.
    """

    name: str
    tone: str
    x: float
    y: float
    shape: str = "circle"


def front(points: Iterable[Point], *, less: bool) -> list[Point]:
    """The points that no other beats in both: fewer bits per byte, and a lower `x` (a higher one, unless `less`)."""
    best, found = float("inf"), []
    for point in sorted(points, key=lambda point: (point.x if less else -point.x, point.y)):
        if point.y < best:
            best = point.y
            found.append(point)
    return found


def tradeoff(canvas: Canvas, points: Sequence[Point], *, x: str, y: str, less: bool) -> alt.TopLevelMixin:
    """Points with labels, and the line through those that no other beats (Pareto's front)."""
    height = 300
    domain_x, domain_y = _padded([point.x for point in points], 0.14), _padded([point.y for point in points], 0.12)
    if less:
        domain_x = (0.0, domain_x[1])
    inner = canvas.width - _MARGIN
    placed = [
        (
            (point.x - domain_x[0]) / (domain_x[1] - domain_x[0]) * inner,
            (domain_y[1] - point.y) / (domain_y[1] - domain_y[0]) * height,
        )
        for point in points
    ]
    rows = [
        {**row, "name": point.name, "x": point.x, "y": point.y, "shape": point.shape}
        for point, row in zip(points, labels([point.name for point in points], placed, inner), strict=True)
    ]
    for row in rows:
        row["label_y"] = domain_y[1] - row["at"] / height * (domain_y[1] - domain_y[0])
    scales = {
        "x": alt.X("x:Q", scale=alt.Scale(domain=domain_x, nice=False, zero=False), title=x),
        "y": alt.Y("y:Q", scale=alt.Scale(domain=domain_y, nice=False, zero=False), title=y),
    }
    line = [{"x": point.x, "y": point.y} for point in front(points, less=less)]
    base = alt.Chart(data(rows)).encode(**scales)
    marks = base.mark_point(size=130, stroke=light("paper"), strokeWidth=1.5).encode(
        color=colour({point.name: point.tone for point in points}),
        shape=alt.Shape(
            "shape:N", scale=alt.Scale(domain=(s := ["circle", "diamond", "square"]), range=s), legend=None
        ),
    )
    edge = alt.Chart(data(line)).mark_line(
        interpolate="step-after" if less else "step-before", stroke=light("soft"), strokeWidth=1.2, strokeDash=[3, 3]
    )
    return alt.layer(
        edge.encode(**scales), marks, *_texts(rows, scales["x"], "label_y"), width=canvas.width, height=height
    )


def roofline(
    canvas: Canvas, points: Sequence[Point], *, bandwidth: float, peaks: Sequence[tuple[str, float]]
) -> alt.TopLevelMixin:
    """Multiply-adds a second against multiply-adds by byte, both logarithmic, under what memory and processor allow.

    Args:
        canvas: What it is drawn on.
        points: What was measured: `x` multiply-adds by byte, `y` multiply-adds a second.
        bandwidth: Bytes a second.
        peaks: Name and multiply-adds a second of each kind of product.
    """
    top = max((peak for _, peak in peaks), default=max(point.y for point in points))
    left = min([point.x for point in points] + [top / bandwidth / 4]) / 2
    right = max([point.x for point in points] + [top / bandwidth]) * 3
    roofs: list[dict[str, Any]] = []
    for name, peak in peaks or [("", bandwidth * right)]:
        knee = peak / bandwidth
        corners = [(left, left * bandwidth), (knee, peak), *([(right, peak)] if knee < right else [])]
        roofs += [{"roof": name, "x": x, "y": y} for x, y in corners]
    low = min([point.y for point in points] + [left * bandwidth]) / 2
    scales = {
        "x": alt.X(
            "x:Q",
            scale=alt.Scale(type="log", domain=[left, right], nice=False),
            title="multiply-adds for each byte read",
            axis=alt.Axis(values=_powers(left, right), format="~s"),
        ),
        "y": alt.Y(
            "y:Q",
            scale=alt.Scale(type="log", domain=[low, top * 2], nice=False),
            title="multiply-adds a second",
            axis=alt.Axis(values=_powers(low, top * 2), format="~s"),
        ),
    }
    lines = alt.Chart(data(roofs)).mark_line(stroke=light("soft"), strokeWidth=1.6).encode(**scales, detail="roof:N")
    ends = [{"x": right, "y": peak, "label": f"{name} peak"} for name, peak in peaks]
    names = (
        alt.Chart(data([*ends]))
        .mark_text(align="right", dy=-8, color=light("soft"), fontSize=11)
        .encode(**scales, text="label:N")
    )
    rows = [{"name": p.name, "x": p.x, "y": p.y, "shape": p.shape} for p in points]
    marks = (
        alt.Chart(data(rows))
        .mark_point(size=130, stroke=light("paper"), strokeWidth=1)
        .encode(
            **scales,
            color=colour({point.name: point.tone for point in points}),
            shape=alt.Shape(
                "shape:N",
                scale=alt.Scale(domain=["decode", "prefill"], range=["circle", "triangle-up"]),
                legend=None,
            ),
        )
    )
    return alt.layer(lines, names, marks, width=canvas.width, height=300)


def _powers(low: float, high: float) -> list[float]:
    """The powers of ten between two numbers."""
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def labels(names: Sequence[str], places: Sequence[tuple[float, float]], width: float) -> list[dict[str, Any]]:
    """Where labels stand, so that none lies on another: for each its side of the point and its height `at`, in pixels.

    A label stands to the right of its point, or to the left where there is no room; those that would overlap are moved
    down, from the topmost on.
    """
    found: list[dict[str, Any]] = [{} for _ in names]
    taken: list[tuple[float, float, float]] = []
    for index in sorted(range(len(names)), key=lambda index: places[index][1]):
        (x, y), length = places[index], len(names[index]) * CHARACTER + 14
        right = x + length <= width
        start, end = (x, x + length) if right else (x - length, x)
        for other_start, other_end, other_y in sorted(taken, key=lambda each: each[2]):
            if start < other_end and other_start < end and abs(y - other_y) < LINE:
                y = other_y + LINE
        taken.append((start, end, y))
        found[index] = {"side": "right" if right else "left", "at": y}
    return found


def _texts(rows: Sequence[dict[str, Any]], x: alt.X, height: str) -> list[alt.Chart]:
    """Labels on either side of their points, each on a halo that parts it from the lines under it."""
    paper, ink = light("paper"), light("ink")
    return [
        alt.Chart(data(mine)).mark_text(align=align, dx=dx, **look).encode(x=x, y=f"{height}:Q", text="name:N")
        for side, align, dx in (("right", "left", 11), ("left", "right", -11))
        if (mine := [row for row in rows if row["side"] == side])
        for look in ({"color": paper, "stroke": paper, "strokeWidth": 5, "strokeJoin": "round"}, {"color": ink})
    ]


def _padded(values: Sequence[float], part: float) -> tuple[float, float]:
    """An axis' ends, with room around what stands on it."""
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * part
    return low - room, high + room
