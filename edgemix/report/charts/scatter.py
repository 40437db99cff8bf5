"""Scatter charts: quality against cost, and the roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import altair as alt

from edgemix.report.charts.basic import CHARACTER_WIDTH, color_encoding
from edgemix.report.charts.drawing import inline_data
from edgemix.report.charts.palette import light

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgemix.report.charts.drawing import Canvas

LINE = 16
"""Height of a label, in pixels."""
_POINT, _GAP = 8, 11
"""Half of a point's width, and how far from its middle a label begins, in pixels."""
_MARGIN = 46
"""Roughly what the vertical axis takes of a canvas."""


@dataclass(frozen=True, slots=True)
class Point:
    """A named point.

    Attributes:
        name: The label.
        color: Name of a color of the palette.
        x, y: The coordinates.
        shape: The mark: a Vega symbol such as "circle", "diamond" or "square"; the roofline's are named by phase.
    """

    name: str
    color: str
    x: float
    y: float
    shape: str = "circle"


def pareto_front(points: Iterable[Point], *, lower_x: bool) -> list[Point]:
    """Return the points that no other point beats in both coordinates: lower y, and lower (or else higher) x."""
    best, found = float("inf"), []
    for point in sorted(points, key=lambda point: (point.x if lower_x else -point.x, point.y)):
        if point.y < best:
            best = point.y
            found.append(point)
    return found


def pareto_chart(canvas: Canvas, points: Sequence[Point], *, x: str, y: str, lower_x: bool) -> alt.TopLevelMixin:
    """Draw labeled points and their Pareto front.

    The horizontal axis begins at zero, the vertical axis just below the lowest point.

    Args:
        canvas: The canvas.
        points: At least one.
        x: The horizontal axis' title.
        y: The vertical axis' title; lower is better.
        lower_x: Whether lower is better on the horizontal axis; otherwise higher is.
    """
    height = 300
    low_x, high_x = 0.0, max(point.x for point in points) * 1.14 or 1.0
    low_y, high_y = _padded([point.y for point in points], 0.12)
    inner = canvas.width - _MARGIN
    placed = [
        ((point.x - low_x) / (high_x - low_x) * inner, (high_y - point.y) / (high_y - low_y) * height)
        for point in points
    ]
    labelled = labels([point.name for point in points], placed, inner)
    rows = [
        {
            "name": point.name,
            "x": point.x,
            "y": point.y,
            "shape": point.shape,
            "side": label.side,
            "label_y": high_y - label.at / height * (high_y - low_y),
        }
        for point, label in zip(points, labelled, strict=True)
    ]
    across = alt.X("x:Q", scale=alt.Scale(domain=[low_x, high_x], nice=False, zero=False), title=x)
    up = alt.Y("y:Q", scale=alt.Scale(domain=[low_y, high_y], nice=False, zero=False), title=y)
    line = [{"x": point.x, "y": point.y} for point in pareto_front(points, lower_x=lower_x)]
    shapes = ["circle", "diamond", "square"]
    marks = alt.Chart(inline_data(rows)).mark_point(size=130, stroke=light("background"), strokeWidth=1.5)
    edge = alt.Chart(inline_data(line)).mark_line(
        interpolate="step-after" if lower_x else "step-before",
        stroke=light("muted"),
        strokeWidth=1.2,
        strokeDash=[3, 3],
    )
    return alt.layer(
        edge.encode(x=across, y=up),
        *_texts(rows, across),
        marks.encode(
            x=across,
            y=up,
            color=color_encoding({point.name: point.color for point in points}),
            shape=alt.Shape("shape:N", scale=alt.Scale(domain=shapes, range=shapes), legend=None),
        ),
        width=canvas.width,
        height=height,
    )


def roofline(
    canvas: Canvas, points: Sequence[Point], *, bandwidth: float, peaks: Sequence[tuple[str, float]]
) -> alt.TopLevelMixin:
    """Draw measured points under the limits of memory bandwidth and arithmetic, on logarithmic axes.

    Args:
        canvas: The canvas.
        points: At least one: x is multiply-adds per byte, y is multiply-adds per second.
        bandwidth: Bytes per second.
        peaks: Name and multiply-adds per second of each data type.
    """
    top = max([point.y for point in points] + [peak for _, peak in peaks])
    left = min([point.x for point in points] + [top / bandwidth / 4]) / 2
    right = max([point.x for point in points] + [top / bandwidth]) * 3
    low = min([point.y for point in points] + [left * bandwidth]) / 2
    roofs = [
        {"roof": name, "x": x, "y": y}
        for name, peak in peaks or [("", bandwidth * right)]
        for x, y in ((left, left * bandwidth), (peak / bandwidth, peak), (right, peak))
    ]
    across = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", domain=[left, right], nice=False),
        title="multiply-adds per byte read",
        axis=alt.Axis(values=_powers(left, right), format="~s"),
    )
    up = alt.Y(
        "y:Q",
        scale=alt.Scale(type="log", domain=[low, top * 2], nice=False),
        title="multiply-adds per second",
        axis=alt.Axis(values=_powers(low, top * 2), format="~s"),
    )
    lines = alt.Chart(inline_data(roofs)).mark_line(stroke=light("muted"), strokeWidth=1.6, clip=True)
    names = alt.Chart(inline_data([{"x": right, "y": peak, "label": f"{name} peak"} for name, peak in peaks]))
    texts = names.mark_text(align="right", dy=-8, color=light("muted"), fontSize=11)
    rows = [{"name": point.name, "x": point.x, "y": point.y, "shape": point.shape} for point in points]
    marks = alt.Chart(inline_data(rows)).mark_point(size=130, stroke=light("background"), strokeWidth=1)
    marks_by_phase = alt.Scale(domain=["decode", "prefill"], range=["circle", "triangle-up"])
    return alt.layer(
        lines.encode(x=across, y=up, detail="roof:N"),
        texts.encode(x=across, y=up, text="label:N"),
        marks.encode(
            x=across,
            y=up,
            color=color_encoding({point.name: point.color for point in points}),
            shape=alt.Shape("shape:N", scale=marks_by_phase, legend=None),
        ),
        width=canvas.width,
        height=300,
    )


def _powers(low: float, high: float) -> list[float]:
    """Return the powers of ten between two numbers."""
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


class Label(NamedTuple):
    """Where a label stands: on which side of its point, and how far below the top, in pixels."""

    side: Literal["left", "right"]
    at: float


def labels(names: Sequence[str], places: Sequence[tuple[float, float]], width: float) -> list[Label]:
    """Places for labels of points, so that none lies on another or on a point.

    A label stands to the right of its point, or to the left where there is no room; those that would overlap are moved
    down, from the topmost on.

    Args:
        names: The labels.
        places: The points': from the left and from the top, in pixels.
        width: Of the chart, in pixels.
    """
    found: dict[int, Label] = {}
    taken = [(x - _POINT, x + _POINT, at) for x, at in places]
    for index in sorted(range(len(names)), key=lambda index: places[index][1]):
        (x, at), length = places[index], len(names[index]) * CHARACTER_WIDTH
        side: Literal["left", "right"] = "right" if x + _GAP + length <= width else "left"
        start = x + _GAP if side == "right" else x - _GAP - length
        for other_start, other_end, other_at in sorted(taken, key=lambda each: each[2]):
            if start < other_end and other_start < start + length and abs(at - other_at) < LINE:
                at = other_at + LINE
        taken.append((start, start + length, at))
        found[index] = Label(side, at)
    return [found[index] for index in range(len(names))]


def _texts(rows: Sequence[dict[str, Any]], across: alt.X) -> list[alt.Chart]:
    """Labels on either side of their points, each on a halo that parts it from the lines under it."""
    paper, ink = light("background"), light("text")
    halos, texts = [], []
    for side in ("right", "left"):
        mine = alt.Chart(inline_data([row for row in rows if row["side"] == side]))
        align: Literal["left", "right"] = "left" if side == "right" else "right"
        dx = _GAP if side == "right" else -_GAP
        halos.append(mine.mark_text(align=align, dx=dx, color=paper, stroke=paper, strokeWidth=5, strokeJoin="round"))
        texts.append(mine.mark_text(align=align, dx=dx, color=ink))
    return [text.encode(x=across, y="label_y:Q", text="name:N") for text in (*halos, *texts)]


def _padded(values: Sequence[float], part: float) -> tuple[float, float]:
    """Return the ends of an axis with a margin around its values."""
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * part
    return low - room, high + room
