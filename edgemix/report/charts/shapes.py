"""The shapes of chart that the report's sections share. Each is drawn on a canvas, from rows of plain data.

Rows name what they are of in "name"; `tones` says which colour that has (see `palette`). The page has the legends.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.report.charts.drawing import data
from edgemix.report.charts.palette import light

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgemix.report.charts.drawing import Canvas

    Row = Mapping[str, Any]
    Tones = Mapping[str, str]

BAND = 30
"""Height of a row of bars or ranges, in pixels."""
CHARACTER = 7.0
"""Width of a label's character, in pixels: wider than most fonts', as it is not known here which one a reader has."""


def colour(tones: Tones) -> alt.Color:
    """The colour of what a row is of."""
    return alt.Color("name:N", scale=scale_of(tones), legend=None)


def scale_of(tones: Tones) -> alt.Scale:
    """From names to colours."""
    return alt.Scale(domain=list(tones), range=[light(tone) for tone in tones.values()])


def bands(canvas: Canvas, field: str, names: Iterable[str], *, padding: float = 0.1) -> alt.Y:
    """A vertical axis of names, with room for them."""
    order = list(dict.fromkeys(names))
    limit = 120 if canvas.narrow else 240
    room = min(limit, max(map(len, order), default=0) * CHARACTER + 6)
    axis = alt.Axis(minExtent=room, maxExtent=limit, labelLimit=limit)
    return alt.Y(f"{field}:N", sort=order, axis=axis, title=None, scale=alt.Scale(padding=padding))


def shares(canvas: Canvas, rows: Sequence[Row], tones: Tones) -> alt.TopLevelMixin:
    """Stacked bars of parts of one: rows have "bar", "name" and "share"; large parts are labelled with their size."""
    order = list(dict.fromkeys(row["bar"] for row in rows))
    stacked = []
    for bar in order:
        start = 0.0
        for row in rows:
            if row["bar"] == bar:
                label = f"{row['share']:.0%}" if row["share"] >= (0.16 if canvas.narrow else 0.07) else ""
                stacked.append({**row, "from": start, "to": start + row["share"], "label": label})
                start += row["share"]
    base = alt.Chart(data(stacked), width=canvas.width, height=BAND * len(order)).encode(
        y=bands(canvas, "bar", order, padding=0.18),
        x=alt.X("from:Q", scale=alt.Scale(domain=[0, 1], nice=False), axis=None),
        x2="to:Q",
    )
    parts = base.mark_bar(stroke=light("paper"), strokeWidth=1).encode(color=colour(tones))
    labels = base.mark_text(align="left", dx=8, color=light("paper"), fontWeight=600).encode(text="label:N")
    return alt.layer(parts, labels)


def ranges(canvas: Canvas, rows: Sequence[Row], tones: Tones, *, title: str) -> alt.TopLevelMixin:
    """Quantiles: a dot at the median, a line to the 99th percentile, a tick at the 90th.

    Rows have "name", "p50", "p90", "p99", "label" and "steady"; what is not steady has an open dot.
    """
    highest = max(row["p99"] for row in rows) or 1.0
    scale = alt.Scale(domain=[0, highest * (1.3 if canvas.narrow else 1.1)], nice=False)
    base = alt.Chart(data(rows), width=canvas.width, height=BAND * len(rows)).encode(
        y=bands(canvas, "name", [row["name"] for row in rows])
    )
    line = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("p50:Q", scale=scale, title=title), x2="p99:Q", color=colour(tones)
    )
    tick = base.mark_tick(thickness=2, size=12).encode(x=alt.X("p90:Q", scale=scale), color=colour(tones))
    dots = base.mark_point(filled=False, size=80, strokeWidth=2, fill=light("paper"))
    full = base.transform_filter("datum.steady").mark_point(size=100)
    labels = base.mark_text(align="left", dx=8, fontSize=11, color=light("soft"))
    return alt.layer(
        line,
        tick,
        dots.encode(x=alt.X("p50:Q", scale=scale), color=colour(tones)),
        full.encode(x=alt.X("p50:Q", scale=scale), color=colour(tones)),
        labels.encode(x=alt.X("p99:Q", scale=scale), text="label:N"),
    )


def lines(
    canvas: Canvas,
    rows: Sequence[Row],
    tones: Tones,
    *,
    x: str,
    y: str,
    log_x: bool = True,
    log_y: bool = False,
    height: int = 240,
    measured: bool = True,
) -> alt.TopLevelMixin:
    """A line for each name, through "x" and "y", with a whisker up to "top" where rows have that.

    Args:
        canvas: What it is drawn on.
        rows: The points.
        tones: Name -> tone.
        x: The horizontal axis' title.
        y: The vertical one's.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical one is; otherwise it begins at zero.
        height: In pixels.
        measured: Whether the horizontal axis has its ticks where something was measured.
    """
    highs = [row.get("top", row["y"]) for row in rows]
    if log_y:
        marks = decades(min(row["y"] for row in rows), max(highs))
        scale_y = alt.Scale(type="log", domain=[marks[0], marks[-1]], nice=False)
        axis_y = alt.Axis(values=marks, format="~r")
    else:
        axis_y = alt.Axis()
        scale_y = alt.Scale(domain=[0, max(highs) * 1.05 or 1.0])
    places = {row["x"] for row in rows}
    scale_x = alt.Scale(type="log" if log_x and min(places) > 0 else "linear", nice=False, zero=False)
    axis_x = alt.Axis(values=sorted(places), labelOverlap="greedy") if measured else alt.Axis()
    base = alt.Chart(data(rows), width=canvas.width, height=height).encode(
        x=alt.X("x:Q", scale=scale_x, title=x, axis=axis_x),
        y=alt.Y("y:Q", scale=scale_y, title=y, axis=axis_y),
        color=colour(tones),
    )
    layers = [base.mark_line(), base.mark_point(size=40)]
    if any("top" in row for row in rows):
        layers.insert(0, base.mark_rule(strokeWidth=1.5, opacity=0.55).encode(y2="top:Q"))
    return alt.layer(*layers)


def bars(canvas: Canvas, rows: Sequence[Row], tones: Tones, *, title: str) -> alt.TopLevelMixin:
    """Thin bars in groups: rows have "bar", "name" and "value"; a group has a bar for each name."""
    order = list(dict.fromkeys(row["bar"] for row in rows))
    thickness = 8 if len(tones) > 1 else 14
    chart = alt.Chart(data(rows), width=canvas.width, height=len(order) * (len(tones) * thickness + 12)).mark_bar()
    return alt.layer(
        chart.encode(
            y=bands(canvas, "bar", order, padding=0.2),
            yOffset=alt.YOffset("name:N", sort=list(tones)),
            x=alt.X("value:Q", title=title),
            color=colour(tones),
        )
    )


def decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis, from just below `low` to just above `high`, both above zero.

    1, 2 and 5 in each power of ten; over more than two of them, the powers alone.
    """
    digits = (1, 2, 5) if high <= 100 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    found = [digit * 10.0**power for power in powers for digit in digits]
    first = max(at for at, tick in enumerate(found) if tick <= low * (1 + 1e-9))
    last = min(at for at, tick in enumerate(found) if tick > low and tick >= high * (1 - 1e-9))
    return found[first : last + 1]
