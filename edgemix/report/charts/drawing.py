"""Render Altair charts as inline SVG at two widths; the page shows the one that fits the reader's screen.

vl-convert renders Vega-Lite to SVG in this process, without a browser or network, and escapes all text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import altair as alt
import vl_convert
from markupsafe import Markup, escape

from edgemix.report.blocks import Figure, legend
from edgemix.report.charts.palette import light
from edgemix.report.formatting import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemix.report.blocks import Table

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_NAMESPACE = re.compile(r' xmlns(?::\w+)?="[^"]*"')
_ROLE = re.compile(r' (?:role|aria-\w+|pointer-events|class)="[^"]*"')
_ID = re.compile(r'(\bid="|url\(#)')
_EMPTY = re.compile(r'<path d="[^"]*"(?: display="none")?/>')


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size that a chart is drawn for.

    Attributes:
        name: CSS class of the SVG element.
        width: Pixels.
        narrow: Whether the chart is for a phone.
    """

    name: str
    width: int
    narrow: bool


WIDE, NARROW = Canvas("wide", 740, narrow=False), Canvas("narrow", 350, narrow=True)


def draw(id_: str, title: str, chart: Callable[[Canvas], alt.TopLevelMixin]) -> Markup:
    """Render a chart as two SVG elements with a title.

    Args:
        id_: The figure's id, the prefix of all ids inside the SVG.
        title: The text that screen readers announce.
        chart: Builds the chart for a canvas.
    """
    return Markup("\n").join(_svg(id_, title, canvas, chart(canvas)) for canvas in (WIDE, NARROW))


def figure(
    id_: str,
    table: Table,
    chart: Callable[[Canvas], alt.TopLevelMixin],
    caption: str,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Render a chart with the table of its numbers, under the table's title; `colors` adds a legend."""
    drawing = draw(id_, table.title, chart)
    return Figure(id_, table.title, drawing, caption, legend(colors or {}), table=table)


def inline_data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Return rows as a chart's data, in JSON, which Altair does not validate row by row."""
    return alt.InlineData(json.dumps(_cleaned([dict(row) for row in rows])), format={"type": "json"})


def _svg(id_: str, title: str, canvas: Canvas, chart: alt.TopLevelMixin) -> Markup:
    document = _cleaned({**chart.to_dict(validate=False), "config": _config(canvas)})
    drawn = vl_convert.vegalite_to_svg(document, allowed_base_urls=[])
    label = f"{id_}-{canvas.name}"
    # Several drawings share a page, so ids get the drawing's name as a prefix.
    body = _ID.sub(rf"\g<1>{label}-", _EMPTY.sub("", _ROLE.sub("", _NAMESPACE.sub("", drawn))))
    opening, _, rest = body.partition(">")
    size = re.search(r'viewBox="[^"]*"', opening)
    if size is None:
        raise ValueError("the SVG has no viewBox")
    head = f'<svg class="{canvas.name}" role="img" aria-labelledby="{label}-title" {size[0]}>'
    return Markup(f'{head}<title id="{label}-title">{escape(clean(title))}</title>{rest}')  # noqa: S704 - vl-convert escapes


def _cleaned(value: Any) -> Any:
    """Replace the characters that XML forbids in all strings of a chart's document."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return value


def _config(canvas: Canvas) -> dict[str, Any]:
    """Return the Vega-Lite config that all charts share."""
    text, muted, border = light("text"), light("muted"), light("border")
    size = 12
    return {
        "background": None,
        "aria": False,
        "font": FONT,
        "padding": 2,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "view": {"stroke": None, "continuousWidth": canvas.width, "discreteWidth": canvas.width},
        "axis": {
            "labelColor": muted,
            "labelFontSize": size,
            "labelPadding": 6,
            "labelLimit": 150 if canvas.narrow else 260,
            "titleColor": muted,
            "titleFontSize": size,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "ticks": False,
            "domain": False,
            "gridColor": border,
            "gridWidth": 1,
        },
        "axisX": {"grid": True, "tickCount": 4 if canvas.narrow else 6, "titleAnchor": "start"},
        "axisY": {
            "grid": True,
            "tickCount": 5,
            "titleAngle": 0,
            "titleAlign": "left",
            "titleAnchor": "end",
            "titleX": 0,
            "titleY": -14,
            "titleBaseline": "bottom",
        },
        "axisYBand": {"grid": False, "labelColor": text, "title": None},
        "axisYPoint": {"grid": False, "labelColor": text, "title": None},
        "text": {"fontSize": size, "color": text},
        "line": {"strokeWidth": 2, "strokeCap": "round", "strokeJoin": "round"},
        "point": {"filled": True, "size": 70, "opacity": 1},
    }
