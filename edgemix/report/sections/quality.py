"""Quality against size and speed, and by text."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, row
from edgemix.report.charts.drawing import figure
from edgemix.report.charts.palette import HEAT_COLORS
from edgemix.report.charts.scatter import Point, pareto_chart
from edgemix.report.data import mixture_row, row_label

if TYPE_CHECKING:
    from edgemix.report.data import ReportData
    from edgemix.results.evaluation import Evaluation, Row

EXCESS = (0.01, 0.05, 0.1, 0.2, 0.4)
"""Steps of the heat map: relative excess over the column's minimum."""
_SHAPES = {"member": "circle", "student": "diamond", "mixture": "square"}


def quality_section(data: ReportData) -> Section:
    """Return the section with an evaluation's results."""
    title = "Quality against size and speed"
    evaluation = data.evaluation
    if evaluation is None:
        note = Note(
            "Give texts to see how well members and mixture predict them: edgemix report BUNDLE TEXT...", missing=True
        )
        return Section("quality", title, "Not measured.", (note,))
    own = mixture_row(evaluation)
    blocks: list[Block] = []
    if any(math.isfinite(each.overall.bits_per_byte) for each in _shown(evaluation)):
        blocks.append(_size(data, evaluation))
    rates = [each for each in decode_rates(data, evaluation) if math.isfinite(each[0].overall.bits_per_byte)]
    if len(rates) > 1:
        blocks.append(_speed(data, evaluation, rates))
    else:
        blocks.append(Note("Give a profile, or leave --no-speed out, to see quality against speed.", missing=True))
    blocks.append(_heat(evaluation))
    blocks.append(_agreement(data, evaluation))
    files = len(own.files)
    return Section(
        "quality",
        title,
        "Bits per byte is a text's negative log2-likelihood divided by its bytes: lower is better. Measured on "
        f"{own.overall.tokens:,} tokens of {'one text' if files == 1 else f'{files} texts'}.",
        tuple(blocks),
    )


def _shown(evaluation: Evaluation) -> list[Row]:
    """Return the rows that belong in a chart: all but mixtures with the weights of a single domain."""
    return [row for row in evaluation.rows if not row.name.startswith("fitted to ") or row.kind != "mixture"]


def _color(data: ReportData, row: Row, evaluation: Evaluation) -> str:
    if row.kind == "mixture":
        return "text" if row.name == evaluation.mixture else "muted"
    return data.colors.get(row.name, "muted")


def _point(data: ReportData, row: Row, evaluation: Evaluation, x: float, name: str = "") -> Point:
    """Return a row's point in a chart of bits per byte; with two mixtures, `name` says which one it is."""
    adaptive = row.kind == "mixture" and row.name == "adaptive"
    return Point(
        name or row_label(row, evaluation),
        "muted" if row.kind == "mixture" and "plain" in name else _color(data, row, evaluation),
        x,
        row.overall.bits_per_byte,
        "triangle-up" if adaptive else _SHAPES[row.kind],
    )


def _pareto_figure(id_: str, table: Table, points: list[Point], caption: str, *, x: str, lower_x: bool) -> Figure:
    """Return a chart of bits per byte against `x`, under the title of the table with its numbers."""
    finite = [point for point in points if math.isfinite(point.y)]
    chart = partial(pareto_chart, points=finite, x=x, y="bits per byte (lower is better)", lower_x=lower_x)
    legend = tuple(Cell(point.name, point.color, shape=point.shape) for point in finite)
    caption += " The dashed line is the Pareto front. The vertical axis does not begin at zero."
    return figure(id_, table, chart, caption, legend)


def _size(data: ReportData, evaluation: Evaluation) -> Figure:
    points, rows = [], []
    for each in _shown(evaluation):
        size = data.size_of_row(each)
        point = _point(data, each, evaluation, size / 1e6)
        points.append(point)
        cells = data.format_of(each), formatting.size(size), f"{point.y:.4f}"
        rows.append(row(Cell(point.name, point.color), *cells))
    columns = ("", "Format", "Size", "Bits per byte")
    return _pareto_figure(
        "quality-size",
        Table("Quality against size", columns, tuple(rows), left=2, collapsed=True),
        points,
        "Circles are members, the diamond is the student, squares and the triangle are mixtures.",
        x="MB on disk (lower is better)",
        lower_x=True,
    )


def decode_rates(data: ReportData, evaluation: Evaluation) -> list[tuple[Row, str, float]]:
    """Return the rows with a measured decode rate, each with its label and its tokens per second."""
    if data.profile is None:
        plain = [(row, _plain_label(row, evaluation), row.decode_rate) for row in evaluation.rows]
        generated = [(row, row_label(row, evaluation), row.generation_rate) for row in evaluation.rows]
        return [(row, name, rate) for row, name, rate in (*plain, *generated) if rate is not None]
    found, weights = [], data.profile.weights
    rows = {row.name: row for row in reversed(evaluation.rows) if row.kind != "mixture"}
    mixtures = {row.name.removeprefix("fitted to "): row for row in evaluation.rows if row.kind == "mixture"}
    mixed = mixtures.get(weights) if weights else mixture_row(evaluation)
    for result in data.profile.results:
        row = mixed if result.kind == "mixture" else rows.get(result.name)
        if row is not None and result.rate is not None:
            found.append((row, formatting.name(result.name), result.rate))
    return found


def _plain_label(row: Row, evaluation: Evaluation) -> str:
    """Return a row's label, which says that a mixture's rate is that of the plain loop where both were measured."""
    both = row.kind == "mixture" and any(each.generation_rate is not None for each in evaluation.rows)
    return f"{row_label(row, evaluation)}, plain loop" if both else row_label(row, evaluation)


def _speed(data: ReportData, evaluation: Evaluation, rates: list[tuple[Row, str, float]]) -> Figure:
    points = [_point(data, each, evaluation, rate, name) for each, name, rate in rates]
    rows = tuple(row(Cell(p.name, p.color), formatting.digits(p.x), f"{p.y:.4f}") for p in points)
    return _pareto_figure(
        "quality-speed",
        Table("Quality against speed", ("", "Tokens/s", "Bits per byte"), rows, collapsed=True),
        points,
        "Decoding, one text at a time.",
        x="tokens per second (higher is better)",
        lower_x=False,
    )


def heat_color(value: float, best: float) -> str:
    """Return the background color of a cell by its relative excess over the column's minimum."""
    excess = value / best - 1 if best > 0 else 0.0 if value <= best else EXCESS[-1]
    return HEAT_COLORS[sum(excess >= step for step in EXCESS)]


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
            Cell(f"{value:.3f}", heat_color(value, lowest), emphasized=value == lowest)
            for value, lowest in zip(bits[index], best, strict=True)
        ]
        rows.append(row(row_label(each, evaluation), *cells))
    steps = [f"below {formatting.share(EXCESS[0])}", *(f"from {formatting.share(step)}" for step in EXCESS)]
    return Table(
        "Bits per byte by text",
        ("", *(formatting.name(file) for file in files), "all texts"),
        tuple(rows),
        heat=True,
        legend=tuple(Cell(text, color) for text, color in zip(steps, HEAT_COLORS, strict=True)),
    )


def _agreement(data: ReportData, evaluation: Evaluation) -> Table:
    rows = []
    for each in evaluation.rows:
        figures = each.overall
        if each.kind != "mixture" or each.name == evaluation.mixture:
            rows.append(
                row(
                    Cell(row_label(each, evaluation), _color(data, each, evaluation)),
                    f"{figures.perplexity:,.2f}",
                    "" if figures.agreement is None else formatting.share(figures.agreement, 1),
                    "" if figures.acceptance is None else formatting.share(figures.acceptance, 1),
                    "" if each.decode_rate is None else formatting.digits(each.decode_rate),
                )
            )
    columns = ("", "Perplexity", "Greedy agreement", "Acceptance rate as draft", "Tokens/s, plain loop")
    timed = any(each.decode_rate is not None for each in evaluation.rows)
    width = len(columns) if timed else len(columns) - 1
    return Table("Agreement of each model with the mixture", columns[:width], tuple(cells[:width] for cells in rows))
