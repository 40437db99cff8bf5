"""Quality: against size and speed, and by text."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, row
from edgemix.report.charts.drawing import draw
from edgemix.report.charts.palette import HEAT_TONES
from edgemix.report.charts.scatter import Point, tradeoff
from edgemix.report.data import label, own_row

if TYPE_CHECKING:
    from edgemix.report.data import Material
    from edgemix.results.evaluation import Evaluation, Row

EXCESS = (0.01, 0.05, 0.1, 0.2, 0.4)
"""A heat map's steps: by how much more than the best of the column."""
_SHAPES = {"member": "circle", "student": "diamond", "mixture": "square"}


def quality_section(material: Material) -> Section:
    """What an evaluation found."""
    title = "Quality, against size and speed"
    evaluation = material.evaluation
    if evaluation is None:
        note = Note(
            "Give texts to see how well members and mixture predict them: edgemix report BUNDLE TEXT...", missing=True
        )
        return Section("quality", title, "Not measured.", (note,))
    own = own_row(evaluation)
    blocks: list[Block] = []
    if any(math.isfinite(each.overall.bits_per_byte) for each in _shown(evaluation)):
        blocks.append(_size(material, evaluation))
    rates = [each for each in _rates(material, evaluation) if math.isfinite(each[0].overall.bits_per_byte)]
    if len(rates) > 1:
        blocks.append(_speed(material, evaluation, rates))
    else:
        blocks.append(Note("Give a profile, or leave --no-speed out, to see quality against speed.", missing=True))
    blocks.append(_heat(evaluation))
    blocks.append(_closeness(material, evaluation))
    files = len(own.files)
    return Section(
        "quality",
        title,
        "Bits per byte are what a model needs to write the text down: fewer are better. On "
        f"{own.overall.tokens:,} tokens of {'one text' if files == 1 else f'{files} texts'}.",
        tuple(blocks),
    )


def _shown(evaluation: Evaluation) -> list[Row]:
    """The rows that stand for a way to use the bundle; weights of one domain do not, on texts of several."""
    return [row for row in evaluation.rows if not row.name.startswith("fitted to ") or row.kind != "mixture"]


def _tone(material: Material, row: Row, evaluation: Evaluation) -> str:
    if row.kind == "mixture":
        return "ink" if row.name == evaluation.mixture else "soft"
    return material.tones.get(row.name, "soft")


def _size(material: Material, evaluation: Evaluation) -> Figure:
    points, rows = [], []
    for each in _shown(evaluation):
        size, bits = material.size_of_row(each), each.overall.bits_per_byte
        points.append(
            Point(label(each, evaluation), _tone(material, each, evaluation), size / 1e6, bits, _SHAPES[each.kind])
        )
        rows.append(
            row(Cell(points[-1].name, points[-1].tone), material.format_of(each), formatting.size(size), f"{bits:.4f}")
        )
    title = "Quality against size"
    return Figure(
        "quality-size",
        title,
        draw(
            "quality-size",
            title,
            partial(
                tradeoff,
                points=[point for point in points if math.isfinite(point.y)],
                x="MB on disk (fewer is better)",
                y="bits per byte (fewer is better)",
                less=True,
            ),
        ),
        "Circles are members, the diamond is the student, squares are mixtures. Nothing lies below and left of the "
        "dashed line. The vertical axis does not begin at zero.",
        table=Table(title, ("", "Format", "Size", "Bits per byte"), tuple(rows), left=2, folded=True),
    )


def _rates(material: Material, evaluation: Evaluation) -> list[tuple[Row, str, float]]:
    """Rows of the evaluation whose decoding was timed: as they are called then, and tokens a second."""
    if material.profile is None:
        return [
            (row, label(row, evaluation), row.decode_rate) for row in evaluation.rows if row.decode_rate is not None
        ]
    found, weights = [], material.profile.weights
    rows = {row.name: row for row in reversed(evaluation.rows) if row.kind != "mixture"}
    mixtures = {row.name.removeprefix("fitted to "): row for row in evaluation.rows if row.kind == "mixture"}
    mixed = mixtures.get(weights) if weights else own_row(evaluation)
    for subject in material.profile.subjects:
        row = mixed if subject.kind == "mixture" else rows.get(subject.name)
        if row is not None and subject.rate is not None:
            found.append((row, formatting.name(subject.name), subject.rate))
    return found


def _speed(material: Material, evaluation: Evaluation, rates: list[tuple[Row, str, float]]) -> Figure:
    points = []
    for each, name, rate in rates:
        tone = "soft" if each.kind == "mixture" and "plain" in name else _tone(material, each, evaluation)
        points.append(Point(name, tone, rate, each.overall.bits_per_byte, _SHAPES[each.kind]))
    title = "Quality against speed"
    return Figure(
        "quality-speed",
        title,
        draw(
            "quality-speed",
            title,
            partial(
                tradeoff,
                points=points,
                x="tokens a second (more is better)",
                y="bits per byte (fewer is better)",
                less=False,
            ),
        ),
        "Decoding, one text at a time. Nothing lies below and right of the dashed line. The vertical axis does not "
        "begin at zero.",
        table=Table(
            title,
            ("", "Tokens/s", "Bits per byte"),
            tuple(row(Cell(p.name, p.tone), formatting.digits(p.x), f"{p.y:.4f}") for p in points),
            folded=True,
        ),
    )


def heat_tone(value: float, best: float) -> str:
    """The ground of a cell, by how much more than the column's best its value is."""
    excess = value / best - 1 if best > 0 else 0.0 if value <= best else EXCESS[-1]
    return HEAT_TONES[sum(excess >= step for step in EXCESS)]


def _heat(evaluation: Evaluation) -> Table:
    files = list(evaluation.rows[0].files)
    bits = {
        index: [each.files[file].bits_per_byte for file in files] + [each.overall.bits_per_byte]
        for index, each in enumerate(evaluation.rows)
    }
    best = [min(column) for column in zip(*bits.values(), strict=True)]
    rows = []
    for index, each in enumerate(evaluation.rows):
        cells = [
            Cell(f"{value:.3f}", heat_tone(value, lowest), strong=value == lowest)
            for value, lowest in zip(bits[index], best, strict=True)
        ]
        rows.append(row(label(each, evaluation), *cells))
    steps = [f"under {formatting.share(EXCESS[0])}", *(f"from {formatting.share(step)}" for step in EXCESS)]
    return Table(
        "Bits per byte by text",
        ("", *(formatting.name(file) for file in files), "all"),
        tuple(rows),
        heat=True,
        legend=tuple(Cell(text, tone) for text, tone in zip(steps, HEAT_TONES, strict=True)),
    )


def _closeness(material: Material, evaluation: Evaluation) -> Table:
    rows = []
    for each in evaluation.rows:
        figures = each.overall
        if each.kind != "mixture" or each.name == evaluation.mixture:
            rows.append(
                row(
                    Cell(label(each, evaluation), _tone(material, each, evaluation)),
                    f"{figures.perplexity:,.2f}",
                    "" if figures.agreement is None else formatting.share(figures.agreement, 1),
                    "" if figures.acceptance is None else formatting.share(figures.acceptance, 1),
                    "" if each.decode_rate is None else formatting.digits(each.decode_rate),
                )
            )
    columns = ("", "Perplexity", "Same next token", "Accepted as draft", "Tokens/s")
    timed = any(each.decode_rate is not None for each in evaluation.rows)
    width = len(columns) if timed else len(columns) - 1
    return Table("How close each model comes to the mixture", columns[:width], tuple(cells[:width] for cells in rows))
