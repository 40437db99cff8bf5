"""Bar, stacked-bar, line and quantile charts, each drawn on a canvas from rows of plain data.

A row's "name" selects its color from `colors`, which maps names to colors of the palette. Legends are HTML.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.report.charts.drawing import inline_data
from edgemix.report.charts.palette import light

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgemix.report.charts.drawing import Canvas

    Row = Mapping[str, Any]
    Colors = Mapping[str, str]

ROW_HEIGHT = 30
"""Height of a row of a bar or quantile chart, in pixels."""
CHARACTER_WIDTH = 7.0
"""Width of a label's character, in pixels: an upper bound, as the reader's font is not known."""


def color_encoding(colors: Colors) -> alt.Color:
    """Encode a row's "name" as its color."""
    return alt.Color("name:N", scale=color_scale(colors), legend=None)


def color_scale(colors: Colors) -> alt.Scale:
    """Return the scale from names to colors."""
    return alt.Scale(domain=list(colors), range=[light(color) for color in colors.values()])


def category_axis(canvas: Canvas, field: str, names: Iterable[str], *, padding: float = 0.1) -> alt.Y:
    """Return a vertical axis of names, in the given order, wide enough for the longest."""
    order = list(dict.fromkeys(names))
    limit = 120 if canvas.narrow else 240
    room = min(limit, max(map(len, order), default=0) * CHARACTER_WIDTH + 6)
    axis = alt.Axis(minExtent=room, maxExtent=limit, labelLimit=limit)
    return alt.Y(f"{field}:N", sort=order, axis=axis, title=None, scale=alt.Scale(padding=padding))


def stacked_bar_chart(canvas: Canvas, rows: Sequence[Row], colors: Colors) -> alt.TopLevelMixin:
    """Draw stacked bars of fractions that sum to one: rows have "bar", "name" and "share"; large parts are labeled."""
    order = list(dict.fromkeys(row["bar"] for row in rows))
    stacked = []
    for bar in order:
        start = 0.0
        for row in rows:
            if row["bar"] == bar:
                label = f"{row['share']:.0%}" if row["share"] >= (0.16 if canvas.narrow else 0.07) else ""
                stacked.append({**row, "from": start, "to": start + row["share"], "label": label})
                start += row["share"]
    base = alt.Chart(inline_data(stacked), width=canvas.width, height=ROW_HEIGHT * len(order)).encode(
        y=category_axis(canvas, "bar", order, padding=0.18),
        x=alt.X("from:Q", scale=alt.Scale(domain=[0, 1], nice=False), axis=None),
        x2="to:Q",
    )
    parts = base.mark_bar(stroke=light("background"), strokeWidth=1).encode(color=color_encoding(colors))
    labels = base.mark_text(align="left", dx=8, color=light("background"), fontWeight=600).encode(text="label:N")
    return alt.layer(parts, labels)


def quantile_chart(canvas: Canvas, rows: Sequence[Row], colors: Colors, *, title: str) -> alt.TopLevelMixin:
    """Draw quantiles: a dot at the median, a tick at the 90th percentile, a line to the 99th.

    Rows have "name", "p50", "p90", "p99", "label" and "stable"; measurements that are not stable have an open dot.
    """
    highest = max(row["p99"] for row in rows) or 1.0
    scale = alt.Scale(domain=[0, highest * (1.3 if canvas.narrow else 1.1)], nice=False)
    base = alt.Chart(inline_data(rows), width=canvas.width, height=ROW_HEIGHT * len(rows)).encode(
        y=category_axis(canvas, "name", [row["name"] for row in rows])
    )
    line = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("p50:Q", scale=scale, title=title), x2="p99:Q", color=color_encoding(colors)
    )
    tick = base.mark_tick(thickness=2, size=12).encode(x=alt.X("p90:Q", scale=scale), color=color_encoding(colors))
    dots = base.mark_point(filled=False, size=80, strokeWidth=2, fill=light("background"))
    full = base.transform_filter("datum.stable").mark_point(size=100)
    labels = base.mark_text(align="left", dx=8, fontSize=11, color=light("muted"))
    return alt.layer(
        line,
        tick,
        dots.encode(x=alt.X("p50:Q", scale=scale), color=color_encoding(colors)),
        full.encode(x=alt.X("p50:Q", scale=scale), color=color_encoding(colors)),
        labels.encode(x=alt.X("p99:Q", scale=scale), text="label:N"),
    )


def line_chart(
    canvas: Canvas,
    rows: Sequence[Row],
    colors: Colors,
    *,
    x: str,
    y: str,
    log_x: bool = True,
    log_y: bool = False,
    height: int = 240,
    ticks_at_points: bool = True,
) -> alt.TopLevelMixin:
    """Draw a line for each name through "x" and "y", with a whisker up to "top" where rows have one.

    Args:
        canvas: The canvas.
        rows: The points.
        colors: Name -> color.
        x: The horizontal axis' title.
        y: The vertical axis' title.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic; otherwise it begins at zero.
        height: Pixels.
        ticks_at_points: Whether the horizontal axis has a tick at each distinct "x".
    """
    highs = [row.get("top", row["y"]) for row in rows]
    if log_y:
        marks = log_ticks(min(row["y"] for row in rows), max(highs))
        scale_y = alt.Scale(type="log", domain=[marks[0], marks[-1]], nice=False)
        axis_y = alt.Axis(values=marks, format="~r")
    else:
        axis_y = alt.Axis()
        scale_y = alt.Scale(domain=[0, max(highs) * 1.05 or 1.0])
    xs = {row["x"] for row in rows}
    scale_x = alt.Scale(type="log" if log_x and min(xs) > 0 else "linear", nice=False, zero=False)
    axis_x = alt.Axis(values=sorted(xs), labelOverlap="greedy") if ticks_at_points else alt.Axis()
    base = alt.Chart(inline_data(rows), width=canvas.width, height=height).encode(
        x=alt.X("x:Q", scale=scale_x, title=x, axis=axis_x),
        y=alt.Y("y:Q", scale=scale_y, title=y, axis=axis_y),
        color=color_encoding(colors),
    )
    layers = [base.mark_line(), base.mark_point(size=40)]
    if any("top" in row for row in rows):
        layers.insert(0, base.mark_rule(strokeWidth=1.5, opacity=0.55).encode(y2="top:Q"))
    return alt.layer(*layers)


def grouped_bar_chart(canvas: Canvas, rows: Sequence[Row], colors: Colors, *, title: str) -> alt.TopLevelMixin:
    """Draw bars in groups: rows have "bar", "name" and "value"; each "bar" is a group with a bar for each name."""
    order = list(dict.fromkeys(row["bar"] for row in rows))
    thickness = 8 if len(colors) > 1 else 14
    chart = alt.Chart(
        inline_data(rows), width=canvas.width, height=len(order) * (len(colors) * thickness + 12)
    ).mark_bar()
    return alt.layer(
        chart.encode(
            y=category_axis(canvas, "bar", order, padding=0.2),
            yOffset=alt.YOffset("name:N", sort=list(colors)),
            x=alt.X("value:Q", title=title),
            color=color_encoding(colors),
        )
    )


def log_ticks(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis, from just below `low` to just above `high`, both above zero.

    The ticks are 1, 2 and 5 times each power of ten; over more than two powers, the powers alone.
    """
    digits = (1, 2, 5) if high <= 100 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    found = [digit * 10.0**power for power in powers for digit in digits]
    first = max(at for at, tick in enumerate(found) if tick <= low * (1 + 1e-9))
    last = min(at for at, tick in enumerate(found) if tick > low and tick >= high * (1 - 1e-9))
    return found[first : last + 1]
