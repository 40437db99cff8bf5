"""The roofline of each model, and time by operator and by layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, row
from edgemix.report.charts import basic
from edgemix.report.charts.drawing import figure
from edgemix.report.charts.scatter import Point, roofline
from edgemix.report.sections.speed import MISSING

if TYPE_CHECKING:
    from edgemix.report.data import ReportData
    from edgemix.results.profile import Breakdown, Machine, Profile, RooflinePoint, TargetResult

    Phase = Literal["prefill", "decode"]

OPERATORS = 8
"""Operator types with a bar each; all others share one."""
_PHASES: dict[Phase, str] = {"decode": "Decode", "prefill": "Prefill"}


def hardware_section(data: ReportData) -> Section:
    """Return the section with a profile's roofline, operators and layers."""
    title = "Where the time goes"
    profile = data.profile
    if profile is None:
        note = Note(MISSING.format(what="the roofline and the operators' times"), missing=True)
        return Section("hardware", title, "Not measured.", (note,))
    roofs = [
        (result, roof)
        for result in profile.results
        for roof in result.roofline
        if roof.bytes > 0 and roof.seconds > 0 and roof.operations > 0
    ]
    blocks: list[Block] = []
    if roofs and profile.machine.bandwidth:
        blocks.append(_roofline(data, profile.machine, profile.machine.bandwidth, roofs))
    if profile.breakdowns:
        blocks += [figure for phase in _PHASES if (figure := _operators(data, profile, phase))]
        if figure := _layers(data, profile):
            blocks.append(figure)
    if not blocks:
        blocks.append(Note("The profile has neither a roofline nor operators' times.", missing=True))
    return Section("hardware", title, _lead(roofs), tuple(blocks))


def _lead(roofs: list[tuple[TargetResult, RooflinePoint]]) -> str:
    decoding = [(result, roof) for result, roof in roofs if roof.phase == "decode"]
    if not decoding:
        return "One call of each graph, measured by ONNX Runtime's profiler."
    result, roof = max(decoding, key=lambda pair: pair[1].floor / pair[1].seconds)
    return (
        f"Decoding is bound by {'memory bandwidth' if roof.bound == 'memory' else 'arithmetic'}: "
        f"{formatting.name(result.name)} takes {formatting.seconds(roof.seconds)} per token; this machine's lower "
        f"bound is {formatting.seconds(roof.floor)}."
    )


def _roofline(
    data: ReportData, machine: Machine, bandwidth: float, roofs: list[tuple[TargetResult, RooflinePoint]]
) -> Figure:
    points = [
        Point(
            formatting.name(result.name),
            data.color_of(result),
            roof.operations / roof.bytes,
            roof.operations / roof.seconds,
            "circle" if roof.phase == "decode" else "triangle-up",
        )
        for result, roof in roofs
    ]
    peaks = [(name, peak) for name, peak in (("fp32", machine.fp32_peak), ("int8", machine.int8_peak)) if peak]
    limits = [
        f"{bandwidth / 1e9:,.1f} GB/s",
        *(f"{formatting.count(peak)} multiply-adds/s in {name}" for name, peak in peaks),
    ]
    table = tuple(
        row(
            Cell(formatting.name(result.name), data.color_of(result)),
            roof.phase,
            f"{roof.tokens:,}",
            formatting.size(roof.bytes),
            formatting.count(roof.operations),
            formatting.seconds(roof.seconds),
            formatting.seconds(roof.floor),
            formatting.share(roof.floor / roof.seconds),
        )
        for result, roof in roofs
    )
    columns = ("", "Phase", "Tokens", "Bytes", "Multiply-adds", "Time", "Lower bound", "Of the roofline")
    return figure(
        "roofline",
        Table("Roofline", columns, table, left=2, collapsed=True),
        partial(roofline, points=points, bandwidth=bandwidth, peaks=peaks),
        "Circles are decoding, triangles are prefill. The sloping line is the limit of memory bandwidth, the "
        f"horizontal lines are the limits of arithmetic, as measured on this machine: {', '.join(limits)}. Both axes "
        "are logarithmic.",
        {point.name: point.color for point in points},
    )


def _operators(data: ReportData, profile: Profile, phase: Phase) -> Figure | None:
    """Return a bar chart of the operator types that take longest over all graphs."""
    total: dict[str, float] = {}
    for graph in profile.breakdowns:
        for operator in graph.operators:
            total[operator.type] = total.get(operator.type, 0.0) + getattr(operator, phase)
    ranked = sorted(total, key=total.__getitem__, reverse=True)
    if not ranked:
        return None
    kept = ranked[:OPERATORS]
    order = [formatting.name(kind) for kind in kept] + (["all others"] if len(ranked) > OPERATORS else [])
    rows = []
    for graph in profile.breakdowns:
        times = dict.fromkeys(order, 0.0)
        for operator in graph.operators:
            times[formatting.name(operator.type) if operator.type in kept else "all others"] += (
                getattr(operator, phase) * 1e3
            )
        rows += [{"bar": bar, "name": formatting.name(graph.graph), "value": value} for bar, value in times.items()]
    title = f"{_PHASES[phase]} time by operator"
    length = profile.breakdowns[0].prompt
    unit = "milliseconds per " + (f"call of {length:,} tokens" if phase == "prefill" else "token")
    table = tuple(
        row(
            _name_cell(data, graph),
            formatting.name(operator.type),
            f"{operator.count:,}",
            formatting.seconds(getattr(operator, phase)),
            formatting.share(getattr(operator, phase) / whole) if (whole := getattr(graph, phase)) else "",
        )
        for graph in profile.breakdowns
        for operator in sorted(graph.operators, key=lambda each: -float(getattr(each, phase)))
    )
    return figure(
        f"operators-{phase}",
        Table(title, ("Graph", "Operator", "Nodes", "Time", "Share"), table, left=2, collapsed=True),
        partial(basic.grouped_bar_chart, rows=rows, colors=_colors(data, profile), title=unit),
        "Measured by ONNX Runtime's profiler, which adds some overhead.",
        _colors(data, profile),
    )


def _layers(data: ReportData, profile: Profile) -> Figure | None:
    """Return a line chart of time by layer in a decode call."""
    rows = [
        {"name": formatting.name(graph.graph), "x": at, "y": layer.decode * 1e3}
        for graph in profile.breakdowns
        for at, layer in enumerate(layer for layer in graph.layers if layer.name.startswith("layer "))
    ]
    if not rows:
        return None
    title = "Decode time by layer"
    table = tuple(
        row(
            _name_cell(data, graph),
            formatting.name(layer.name),
            formatting.seconds(layer.decode),
            formatting.seconds(layer.prefill),
        )
        for graph in profile.breakdowns
        for layer in graph.layers
    )
    drawing = partial(
        basic.line_chart,
        rows=rows,
        colors=_colors(data, profile),
        x="layer",
        y="milliseconds",
        log_x=False,
        ticks_at_points=False,
        height=160,
    )
    return figure(
        "layers",
        Table(title, ("Graph", "Part", "Decode", "Prefill"), table, left=2, collapsed=True),
        drawing,
        "The table also lists embedding, head and all other nodes.",
        _colors(data, profile),
    )


def _name_cell(data: ReportData, graph: Breakdown) -> Cell:
    return Cell(formatting.name(graph.graph), data.colors.get(graph.graph, "muted"))


def _colors(data: ReportData, profile: Profile) -> dict[str, str]:
    return {cell.text: cell.color for cell in (_name_cell(data, graph) for graph in profile.breakdowns)}
