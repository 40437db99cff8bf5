"""Charts by Altair as SVG inside a page: at two widths, of which the page shows the one that fits its reader's screen.

vl-convert renders Vega-Lite to SVG in this process: no browser, no network. Text in a drawing is data, never markup.
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
    """What a chart is drawn on: `width` in CSS pixels, without the axes; `narrow` on a phone."""

    name: str
    width: int
    narrow: bool


WIDE, NARROW = Canvas("wide", 740, narrow=False), Canvas("narrow", 350, narrow=True)


def draw(id_: str, title: str, chart: Callable[[Canvas], alt.TopLevelMixin]) -> Markup:
    """A chart as two SVG elements with a title; `chart` makes it for a canvas."""
    return Markup("\n").join(_svg(id_, title, canvas, chart(canvas)) for canvas in (WIDE, NARROW))


def figure(
    id_: str,
    table: Table,
    chart: Callable[[Canvas], alt.TopLevelMixin],
    caption: str,
    tones: Mapping[str, str] | None = None,
) -> Figure:
    """A chart under the title of the table with its figures; with the tones' legend, if they are given."""
    drawing = draw(id_, table.title, chart)
    return Figure(id_, table.title, drawing, caption, legend(tones or {}), table=table)


def data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """A chart's data: as JSON, which Altair does not look through row by row."""
    return alt.InlineData(json.dumps(_cleaned([dict(row) for row in rows])), format={"type": "json"})


def _svg(id_: str, title: str, canvas: Canvas, chart: alt.TopLevelMixin) -> Markup:
    document = _cleaned({**chart.to_dict(validate=False), "config": _config(canvas)})
    drawn = vl_convert.vegalite_to_svg(document, allowed_base_urls=[])
    label = f"{id_}-{canvas.name}"
    # Several drawings share a page: what they refer to inside must stay theirs.
    body = _ID.sub(rf"\g<1>{label}-", _EMPTY.sub("", _ROLE.sub("", _NAMESPACE.sub("", drawn))))
    opening, _, rest = body.partition(">")
    size = re.search(r'viewBox="[^"]*"', opening)
    if size is None:
        raise ValueError("a drawing without a size")
    head = f'<svg class="{canvas.name}" role="img" aria-labelledby="{label}-title" {size[0]}>'
    return Markup(f'{head}<title id="{label}-title">{escape(clean(title))}</title>{rest}')  # noqa: S704 - vl-convert escapes


def _cleaned(value: Any) -> Any:
    """A chart's document without characters that XML does not know."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return value


def _config(canvas: Canvas) -> dict[str, Any]:
    """How all charts look."""
    ink, soft, rule = light("ink"), light("soft"), light("rule")
    size = 12
    return {
        "background": None,
        "aria": False,
        "font": FONT,
        "padding": 2,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "view": {"stroke": None, "continuousWidth": canvas.width, "discreteWidth": canvas.width},
        "axis": {
            "labelColor": soft,
            "labelFontSize": size,
            "labelPadding": 6,
            "labelLimit": 150 if canvas.narrow else 260,
            "titleColor": soft,
            "titleFontSize": size,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "ticks": False,
            "domain": False,
            "gridColor": rule,
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
        "axisYBand": {"grid": False, "labelColor": ink, "title": None},
        "axisYPoint": {"grid": False, "labelColor": ink, "title": None},
        "text": {"fontSize": size, "color": ink},
        "line": {"strokeWidth": 2, "strokeCap": "round", "strokeJoin": "round"},
        "point": {"filled": True, "size": 70, "opacity": 1},
    }
