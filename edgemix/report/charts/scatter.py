"""Scatter charts: quality against cost, and the roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import altair as alt

from edgemix.report.charts.drawing import inline_data
from edgemix.report.charts.palette import light

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgemix.report.charts.drawing import Canvas


@dataclass(frozen=True, slots=True)
class Point:
    """A named point.

    Attributes:
        name: The label.
        color: Name of a color of the palette.
        x, y: The coordinates.
        shape: The mark: a Vega symbol such as "circle", "diamond", "square" or "triangle-up".
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
    """Draw points and their Pareto front; names are in the HTML legend.

    The horizontal axis begins at zero, the vertical axis just below the lowest point.

    Args:
        canvas: The canvas.
        points: At least one.
        x: The horizontal axis' title.
        y: The vertical axis' title; lower is better.
        lower_x: Whether lower is better on the horizontal axis; otherwise higher is.
    """
    scale_x = alt.Scale(domain=[0, max(point.x for point in points) * 1.08 or 1.0], nice=False)
    across = alt.X("x:Q", scale=scale_x, title=x)
    up = alt.Y("y:Q", scale=alt.Scale(nice=False, zero=False, padding=28), title=y)
    front = [{"x": point.x, "y": point.y} for point in pareto_front(points, lower_x=lower_x)]
    line = alt.Chart(inline_data(front)).mark_line(
        interpolate="step-after" if lower_x else "step-before",
        stroke=light("muted"),
        strokeWidth=1.2,
        strokeDash=[3, 3],
    )
    return alt.layer(line.encode(x=across, y=up), _marks(points).encode(x=across, y=up), width=canvas.width, height=300)


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
    return alt.layer(
        lines.encode(x=across, y=up, detail="roof:N"),
        texts.encode(x=across, y=up, text="label:N"),
        _marks(points).encode(x=across, y=up),
        width=canvas.width,
        height=300,
    )


def _marks(points: Sequence[Point]) -> alt.Chart:
    """Return the points' marks, each with its own color and shape."""
    rows = [{"x": point.x, "y": point.y, "color": light(point.color), "shape": point.shape} for point in points]
    marks = alt.Chart(inline_data(rows)).mark_point(size=130, stroke=light("background"), strokeWidth=1.5)
    return marks.encode(color=alt.Color("color:N", scale=None), shape=alt.Shape("shape:N", scale=None))


def _powers(low: float, high: float) -> list[float]:
    """Return the powers of ten between two numbers."""
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
