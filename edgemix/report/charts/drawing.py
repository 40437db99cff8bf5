"""Render Altair charts as inline SVG at two widths; the page shows the one that fits the reader's screen.

vl-convert renders Vega-Lite to SVG in this process, without a browser or network, and escapes all text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import altair as alt
import vl_convert
from markupsafe import Markup

from edgemix.report.blocks import Cell, Figure
from edgemix.report.charts.palette import light
from edgemix.report.formatting import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemix.report.blocks import Table

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_DROPPED = {"version", "class", "role", "aria-hidden", "aria-roledescription"}
"""Attributes of Vega's SVG that the page does not use."""


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


def figure(
    id_: str,
    table: Table,
    chart: Callable[[Canvas], alt.TopLevelMixin],
    caption: str = "",
    legend: Mapping[str, str] | tuple[Cell, ...] = (),
) -> Figure:
    """Render a chart at both widths, under the title of the table with its numbers.

    Args:
        id_: The figure's id in the page.
        table: The chart's numbers.
        chart: Builds the chart for a canvas.
        caption: How to read the chart.
        legend: Name -> color of the palette, or cells with the legend's dots.
    """
    drawing = Markup("\n").join(_svg(id_, table.title, canvas, chart(canvas)) for canvas in (WIDE, NARROW))
    cells = legend if isinstance(legend, tuple) else tuple(Cell(name, color) for name, color in legend.items())
    return Figure(id_, table.title, drawing, caption, cells, table)


def inline_data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Return rows as a chart's data, in JSON, which Altair does not validate row by row."""
    return alt.InlineData(json.dumps([dict(row) for row in rows]), format={"type": "json"})


def _svg(id_: str, title: str, canvas: Canvas, chart: alt.TopLevelMixin) -> Markup:
    """Render a chart as an SVG element of an HTML page: without namespaces, with ids that are unique in the page."""
    document = {**chart.to_dict(validate=False), "config": _config(canvas)}
    drawn = clean(vl_convert.vegalite_to_svg(document, allowed_base_urls=[]))
    root = ET.fromstring(drawn)  # noqa: S314 - vl-convert's own output
    prefix = f"{id_}-{canvas.name}-"
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            name: prefix + value if name == "id" else value.replace("url(#", f"url(#{prefix}")
            for name, value in element.items()
            if name not in _DROPPED
        }
    del root.attrib["width"], root.attrib["height"]  # the viewBox keeps the proportions
    root.attrib |= {"class": canvas.name, "role": "img", "aria-labeledby": f"{prefix}title"}
    heading = ET.Element("title", id=f"{prefix}title")
    heading.text = clean(title)
    root.insert(0, heading)
    return Markup(ET.tostring(root, "unicode"))  # noqa: S704 - ElementTree escapes all text


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
