"""Adaptive weights along texts, as lines and as colored text."""

from __future__ import annotations

from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.report import formatting
from edgemix.report.blocks import Block, ColoredText, Figure, Note, Section, Span, Table, row
from edgemix.report.charts.basic import color_encoding
from edgemix.report.charts.drawing import figure, inline_data
from edgemix.report.charts.palette import light

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.report.charts.drawing import Canvas
    from edgemix.report.data import ReportData
    from edgemix.results.evaluation import WeightTrace

LEVELS = 4
MAX_TOKENS = 4000
"""Maximum number of tokens of all traces together."""


def weight_traces_section(data: ReportData) -> Section:
    """Return the section with the members' weights along texts."""
    title = "Member weights along the text"
    if not data.traces:
        return Section("weight-traces", title, "Not measured.", (Note(_missing_reason(data), missing=True),))
    left, blocks = MAX_TOKENS, list[Block]()
    for index, trace in enumerate(data.traces):
        shown = _truncate(trace, left)
        if len(shown.pieces) < 2:
            blocks.append(Note(f"Further texts are left out: the report shows at most {MAX_TOKENS:,} tokens."))
            break
        left -= len(shown.pieces)
        blocks += [_weight_figure(data, shown, f"weight-trace-{index}"), _colored_text(data, shown, f"text-{index}")]
    return Section(
        "weight-traces",
        title,
        "Adaptive weights follow the text: a member that predicted the last tokens well has more weight for the next "
        "ones.",
        tuple(blocks),
    )


def _missing_reason(data: ReportData) -> str:
    if len(data.members) == 1:
        return "Member weights need a bundle of several members; this one has one member."
    return "Give texts to see which member has the most weight where: edgemix report BUNDLE TEXT..."


def _truncate(trace: WeightTrace, tokens: int) -> WeightTrace:
    if len(trace.pieces) <= tokens:
        return trace
    return type(trace)(
        trace.name,
        trace.pieces[:tokens],
        {name: weights[:tokens] for name, weights in trace.weights.items()},
        tuple((at, name) for at, name in trace.origins if at < tokens),
    )


def _title(trace: WeightTrace) -> str:
    if trace.origins:
        return "A stream that alternates between the texts"
    return f"From {formatting.name(trace.name)}"


def _weight_figure(data: ReportData, trace: WeightTrace, id_: str) -> Figure:
    rows = [
        {"token": at, "name": name, "weight": weight}
        for name, weights in trace.weights.items()
        for at, weight in enumerate(weights)
    ]
    colors = {name: data.colors[name] for name in trace.weights}
    switches = [{"token": at, "label": formatting.name(name)} for at, name in trace.origins]
    sources = dict(trace.origins) or {0: trace.name}
    table = tuple(
        row(
            formatting.name(sources[start]),
            f"{start:,} to {end - 1:,}",
            *(formatting.share(sum(weights[start:end]) / (end - start)) for weights in trace.weights.values()),
        )
        for start, end in pairwise([*sources, len(trace.pieces)])
    )
    columns = ("Text", "Tokens", *map(formatting.name, trace.weights))
    return figure(
        id_,
        Table(_title(trace), columns, table, left=2, collapsed=True),
        partial(_weight_chart, rows=rows, colors=colors, switches=switches, tokens=len(trace.pieces)),
        "Each dotted line is a switch to another text; the table has the mean weights." if switches else "",
        colors,
    )


def _weight_chart(
    canvas: Canvas,
    rows: Sequence[Mapping[str, Any]],
    colors: Mapping[str, str],
    switches: Sequence[Mapping[str, Any]],
    tokens: int,
) -> alt.TopLevelMixin:
    scale = alt.Scale(domain=[0, max(tokens - 1, 1)], nice=False)
    base = alt.Chart(inline_data(rows), width=canvas.width, height=170 if switches else 110).encode(
        x=alt.X("token:Q", scale=scale, title="token", axis=alt.Axis(grid=False)),
        y=alt.Y("weight:Q", scale=alt.Scale(domain=[0, 1]), title=None, axis=alt.Axis(format="%", values=[0, 0.5, 1])),
        color=color_encoding(colors),
    )
    layers: list[alt.Chart] = [
        base.mark_area(opacity=0.14, interpolate="step").encode(y=alt.Y("weight:Q", stack=None)),
        base.mark_line(strokeWidth=1.6, interpolate="step"),
    ]
    if switches:
        at = alt.Chart(inline_data(switches)).encode(x=alt.X("token:Q", scale=scale))
        layers.append(at.mark_rule(color=light("muted"), strokeWidth=1, strokeDash=[2, 3]))
        if not canvas.narrow or len(switches) <= 4:
            layers.append(
                at.mark_text(align="left", dx=4, dy=-8, fontSize=11, color=light("muted")).encode(
                    y=alt.value(0), text="label:N"
                )
            )
    return alt.layer(*layers)


def _colored_text(data: ReportData, trace: WeightTrace, id_: str) -> ColoredText:
    members = list(trace.weights)
    origins = dict(trace.origins)
    leads = []
    part = 0
    for at in range(len(trace.pieces)):
        part += at in origins
        weights = [trace.weights[name][at] for name in members]
        leader = max(range(len(members)), key=weights.__getitem__)
        leads.append((part, leader, level(weights[leader], len(members))))
    spans, at = [], 0
    for (_, leader, strength), group in groupby(leads):
        length = len(list(group))
        text = "".join(trace.pieces[at : at + length])
        spans.append(
            Span(
                text.rstrip("\n") if at + length in origins else text,
                formatting.name(members[leader]),
                data.colors[members[leader]],
                strength,
                formatting.name(origins[at]) if at in origins else "",
            )
        )
        at += length
    return ColoredText(id_, _title(trace), tuple(spans))


def level(weight: float, members: int) -> int:
    """Return how strongly the leading member's color shows: 0 for equal weights, `LEVELS` for a weight of one."""
    if members == 1:
        return LEVELS
    above = (weight - 1 / members) / (1 - 1 / members)
    return min(LEVELS, max(0, round(above * LEVELS)))
