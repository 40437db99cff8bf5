"""Who speaks where: adaptive weights along passages, as lines and as coloured text."""

from __future__ import annotations

from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.report import formatting
from edgemix.report.blocks import Block, ColouredText, Figure, Note, Section, Stretch, Table, legend, row
from edgemix.report.charts.drawing import data, draw
from edgemix.report.charts.palette import light
from edgemix.report.charts.shapes import colour

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.report.charts.drawing import Canvas
    from edgemix.report.data import Material
    from edgemix.results.evaluation import Passage

LEVELS = 4
MAX_TOKENS = 4000
"""Tokens that are shown of all passages together."""


def text_section(material: Material) -> Section:
    """What is known of the weights along texts."""
    title = "Who speaks where"
    if not material.passages:
        return Section("voices", title, "Not measured.", (Note(_why_not(material), missing=True),))
    left, blocks = MAX_TOKENS, list[Block]()
    for index, passage in enumerate(material.passages):
        shown = _shortened(passage, left)
        if len(shown.pieces) < 2:
            blocks.append(Note("Further passages are left out: the report shows no more than so many tokens."))
            break
        left -= len(shown.pieces)
        blocks += [_lines(material, shown, f"voices-{index}"), _coloured(material, shown, f"text-{index}")]
    return Section(
        "voices",
        title,
        "Adaptive weights follow the text: a member that foresaw the last tokens well weighs more for the next ones.",
        tuple(blocks),
    )


def _why_not(material: Material) -> str:
    if len(material.members) == 1:
        return "A bundle of several members would show which of them speaks where; this one has one member."
    return "Give texts to see which member speaks where in them: edgemix report BUNDLE TEXT..."


def _shortened(passage: Passage, tokens: int) -> Passage:
    if len(passage.pieces) <= tokens:
        return passage
    return type(passage)(
        passage.name,
        passage.pieces[:tokens],
        {name: weights[:tokens] for name, weights in passage.weights.items()},
        tuple((at, name) for at, name in passage.origins if at < tokens),
    )


def _title(passage: Passage) -> str:
    if passage.origins:
        return "A stream that alternates between the texts"
    return f"From {formatting.name(passage.name)}"


def _lines(material: Material, passage: Passage, id_: str) -> Figure:
    title = f"Weights along {'a stream of the texts' if passage.origins else formatting.name(passage.name)}"
    rows = [
        {"token": at, "name": name, "weight": weight}
        for name, weights in passage.weights.items()
        for at, weight in enumerate(weights)
    ]
    tones = {name: material.tones[name] for name in passage.weights}
    marks = [{"token": at, "label": formatting.name(name)} for at, name in passage.origins]
    sources = dict(passage.origins) or {0: passage.name}
    starts = [*sources, len(passage.pieces)]
    table = tuple(
        row(
            formatting.name(sources[start]),
            f"{start:,} to {end - 1:,}",
            *(formatting.share(sum(weights[start:end]) / (end - start)) for weights in passage.weights.values()),
        )
        for start, end in pairwise(starts)
    )
    return Figure(
        id_,
        _title(passage),
        draw(id_, title, partial(_weights, rows=rows, tones=tones, marks=marks, tokens=len(passage.pieces))),
        "At each dotted line another text goes on." if marks else "",
        legend(tones),
        table=Table(
            "Mean weights", ("Text", "Tokens", *map(formatting.name, passage.weights)), table, left=2, folded=True
        ),
    )


def _weights(
    canvas: Canvas,
    rows: Sequence[Mapping[str, Any]],
    tones: Mapping[str, str],
    marks: Sequence[Mapping[str, Any]],
    tokens: int,
) -> alt.TopLevelMixin:
    scale = alt.Scale(domain=[0, max(tokens - 1, 1)], nice=False)
    base = alt.Chart(data(rows), width=canvas.width, height=170 if marks else 110).encode(
        x=alt.X("token:Q", scale=scale, title="token", axis=alt.Axis(grid=False)),
        y=alt.Y("weight:Q", scale=alt.Scale(domain=[0, 1]), title=None, axis=alt.Axis(format="%", values=[0, 0.5, 1])),
        color=colour(tones),
    )
    layers: list[alt.Chart] = [
        base.mark_area(opacity=0.14, interpolate="step").encode(y=alt.Y("weight:Q", stack=None)),
        base.mark_line(strokeWidth=1.6, interpolate="step"),
    ]
    if marks:
        at = alt.Chart(data(marks)).encode(x=alt.X("token:Q", scale=scale))
        layers.append(at.mark_rule(color=light("soft"), strokeWidth=1, strokeDash=[2, 3]))
        if not canvas.narrow or len(marks) <= 4:
            layers.append(
                at.mark_text(align="left", dx=4, dy=-8, fontSize=11, color=light("soft")).encode(
                    y=alt.value(0), text="label:N"
                )
            )
    return alt.layer(*layers)


def _coloured(material: Material, passage: Passage, id_: str) -> ColouredText:
    members = list(passage.weights)
    origins = dict(passage.origins)
    leads = []
    part = 0
    for at in range(len(passage.pieces)):
        part += at in origins
        weights = [passage.weights[name][at] for name in members]
        leader = max(range(len(members)), key=weights.__getitem__)
        leads.append((part, leader, level(weights[leader], len(members))))
    stretches, at = [], 0
    for (_, leader, strength), group in groupby(leads):
        length = len(list(group))
        text = "".join(passage.pieces[at : at + length])
        stretches.append(
            Stretch(
                text.rstrip("\n") if at + length in origins else text,
                formatting.name(members[leader]),
                material.tones[members[leader]],
                strength,
                formatting.name(origins[at]) if at in origins else "",
            )
        )
        at += length
    return ColouredText(id_, _title(passage), tuple(stretches))


def level(weight: float, members: int) -> int:
    """How strongly the leading member's colour shows: 0 where all weigh the same, `LEVELS` where it is alone."""
    if members == 1:
        return LEVELS
    above = (weight - 1 / members) / (1 - 1 / members)
    return min(LEVELS, max(0, round(above * LEVELS)))
