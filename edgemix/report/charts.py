"""The shapes of chart that the report's sections share. Each is drawn on a canvas, from rows of plain data.

Rows name what they are of in "name", and where that has a colour, `tones` says which (see `palette`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.report.drawing import data
from edgemix.report.palette import light

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.report.drawing import Canvas

    Row = Mapping[str, Any]
    Tones = Mapping[str, str]

BAND = 30
"""Height of a row of bars or ranges, in pixels."""


def colour(tones: Tones, *, legend: bool = False) -> alt.Color:
    """The colour of what a row is of."""
    return alt.Color("name:N", scale=_scale(tones), legend=alt.Legend() if legend else None)


def _scale(tones: Tones) -> alt.Scale:
    return alt.Scale(domain=list(tones), range=[light(tone) for tone in tones.values()])


def shares(canvas: Canvas, rows: Sequence[Row], tones: Tones) -> alt.TopLevelMixin:
    """Stacked bars of parts of one: rows have "bar", "name" and "share"; large parts are labelled with their size."""
    order = list(dict.fromkeys(row["bar"] for row in rows))
    stacked = []
    for bar in order:
        start = 0.0
        for row in rows:
            if row["bar"] == bar:
                label = f"{row['share']:.0%}" if row["share"] >= (0.12 if canvas.narrow else 0.06) else ""
                stacked.append({**row, "from": start, "to": start + row["share"], "label": label})
                start += row["share"]
    base = alt.Chart(data(stacked), width=canvas.width, height=BAND * len(order)).encode(
        y=alt.Y("bar:N", sort=order, scale=alt.Scale(padding=0.18)),
        x=alt.X("from:Q", scale=alt.Scale(domain=[0, 1], nice=False), axis=None),
        x2="to:Q",
    )
    bars = base.mark_bar(stroke=light("paper"), strokeWidth=1).encode(color=colour(tones, legend=True))
    labels = base.mark_text(align="left", dx=7, color="#ffffff", fontWeight=600).encode(text="label:N")
    return alt.layer(bars, labels)


def ranges(canvas: Canvas, rows: Sequence[Row], tones: Tones, *, title: str) -> alt.TopLevelMixin:
    """Quantiles: a dot at the median, a line to the 99th percentile, a tick at the 90th.

    Rows have "name", "p50", "p90", "p99" and "steady"; what is not steady has an open dot.
    """
    order = [row["name"] for row in rows]
    base = alt.Chart(data(rows), width=canvas.width, height=BAND * len(order)).encode(
        y=alt.Y("name:N", sort=order), color=colour(tones)
    )
    highest = max(row["p99"] for row in rows)
    scale = alt.Scale(domain=[0, highest * (1.24 if canvas.narrow else 1.1)], nice=False)
    line = base.mark_rule(strokeWidth=2).encode(x=alt.X("p50:Q", scale=scale, title=title), x2="p99:Q")
    tick = base.mark_tick(thickness=2, size=12).encode(x=alt.X("p90:Q", scale=scale))
    dots = base.mark_point(size=90, strokeWidth=2, fill=light("paper")).encode(x=alt.X("p50:Q", scale=scale))
    full = (
        base.transform_filter("datum.steady")
        .mark_point(size=90, strokeWidth=2)
        .encode(x=alt.X("p50:Q", scale=scale), fill=alt.Fill("name:N", scale=_scale(tones), legend=None))
    )
    labels = base.mark_text(align="left", dx=8, fontSize=11).encode(
        x=alt.X("p99:Q", scale=scale), text="label:N", color=alt.value(light("soft"))
    )
    return alt.layer(line, tick, dots, full, labels)


def lines(
    canvas: Canvas,
    rows: Sequence[Row],
    tones: Tones,
    *,
    x: str,
    y: str,
    log: bool = False,
    height: int = 240,
    ticks: Sequence[float] = (),
) -> alt.TopLevelMixin:
    """A line for each name, through "x" and "y", with a band up to "top" where rows have that.

    Args:
        canvas: What it is drawn on.
        rows: The points.
        tones: Name -> tone.
        x: The horizontal axis' title.
        y: The vertical one's.
        log: Whether both axes are logarithmic; otherwise the vertical one begins at zero.
        height: In pixels.
        ticks: Of the horizontal axis; those places that were measured.
    """
    scale_x = alt.Scale(type="log", nice=False) if log else alt.Scale(nice=False, zero=False)
    scale_y = alt.Scale(type="log") if log else alt.Scale(zero=True)
    axis = alt.Axis(values=list(ticks)) if ticks else alt.Axis()
    base = alt.Chart(data(rows), width=canvas.width, height=height).encode(
        x=alt.X("x:Q", scale=scale_x, title=x, axis=axis), y=alt.Y("y:Q", scale=scale_y, title=y)
    )
    layers = [
        base.mark_line().encode(color=colour(tones, legend=True)),
        base.mark_point(size=36).encode(color=colour(tones)),
    ]
    if any("top" in row for row in rows):
        layers.insert(0, base.mark_area(opacity=0.14).encode(y2="top:Q", color=colour(tones)))
    return alt.layer(*layers)


def bars(canvas: Canvas, rows: Sequence[Row], tones: Tones, *, title: str, order: Sequence[str]) -> alt.TopLevelMixin:
    """Thin bars in groups: rows have "bar", "name" and "value"; a group has a bar for each name."""
    thickness = 9 if len(tones) > 1 else 16
    height = len(order) * (len(tones) * thickness + 12)
    return (
        alt.Chart(data(rows), width=canvas.width, height=height)
        .mark_bar()
        .encode(
            y=alt.Y("bar:N", sort=list(order), scale=alt.Scale(paddingInner=0.25, paddingOuter=0.1)),
            yOffset=alt.YOffset("name:N", sort=list(tones)),
            x=alt.X("value:Q", title=title),
            color=colour(tones, legend=len(tones) > 1),
        )
    )
