"""Where the time goes: how far from what the machine allows, and in which operators and layers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, legend, row
from edgemix.report.charts import shapes
from edgemix.report.charts.drawing import draw, figure
from edgemix.report.charts.scatter import Point, roofline
from edgemix.report.sections.speed import MISSING

if TYPE_CHECKING:
    from edgemix.report.data import Material
    from edgemix.results.profile import Breakdown, Machine, Profile, Roof, Subject

    Phase = Literal["prefill", "decode"]

OPERATORS = 8
"""Operator types that have a bar of their own; the others share one."""
_PHASES: dict[Phase, str] = {"decode": "a token", "prefill": "a prompt"}


def hardware_section(material: Material) -> Section:
    """What a profile says of machine and graphs."""
    title = "Where the time goes"
    profile = material.profile
    if profile is None:
        note = Note(MISSING.format(what="the roofline and the operators' times"), missing=True)
        return Section("hardware", title, "Not measured.", (note,))
    roofs = [
        (subject, roof)
        for subject in profile.subjects
        for roof in subject.roofs
        if roof.bytes > 0 and roof.seconds > 0 and roof.operations > 0
    ]
    blocks: list[Block] = []
    if roofs and profile.machine.bandwidth:
        blocks.append(_roofline(material, profile.machine, profile.machine.bandwidth, roofs))
    if profile.breakdowns:
        blocks += [figure for phase in _PHASES if (figure := _operators(material, profile, phase))]
        if figure := _layers(material, profile):
            blocks.append(figure)
    if not blocks:
        blocks.append(Note("The profile has neither a roofline nor operators' times.", missing=True))
    return Section("hardware", title, _lead(roofs), tuple(blocks))


def _lead(roofs: list[tuple[Subject, Roof]]) -> str:
    decoding = [(subject, roof) for subject, roof in roofs if roof.phase == "decode"]
    if not decoding:
        return "Of one call of a graph, by ONNX Runtime's own profiler."
    subject, roof = max(decoding, key=lambda pair: pair[1].floor / pair[1].seconds)
    return (
        f"Decoding is bound by {'memory' if roof.bound == 'memory' else 'arithmetic'}: "
        f"{formatting.name(subject.name)} takes {formatting.seconds(roof.seconds)} a token, and the machine could not "
        f"do it in less than {formatting.seconds(roof.floor)}."
    )


def _roofline(material: Material, machine: Machine, bandwidth: float, roofs: list[tuple[Subject, Roof]]) -> Figure:
    title = "Roofline"
    points = [
        Point(
            formatting.name(subject.name),
            material.tone_of(subject),
            roof.operations / roof.bytes,
            roof.operations / roof.seconds,
            roof.phase,
        )
        for subject, roof in roofs
    ]
    peaks = [(name, peak) for name, peak in (("fp32", machine.fp32_peak), ("int8", machine.int8_peak)) if peak]
    limits = [
        f"{bandwidth / 1e9:,.1f} GB/s",
        *(f"{formatting.count(peak)} multiply-adds/s in {name}" for name, peak in peaks),
    ]
    table = tuple(
        row(
            Cell(formatting.name(subject.name), material.tone_of(subject)),
            roof.phase,
            f"{roof.tokens:,}",
            formatting.size(roof.bytes),
            formatting.count(roof.operations),
            formatting.seconds(roof.seconds),
            formatting.seconds(roof.floor),
            formatting.share(roof.floor / roof.seconds),
        )
        for subject, roof in roofs
    )
    columns = ("", "Phase", "Tokens", "Bytes", "Multiply-adds", "Took", "Least possible", "Of the roof")
    return Figure(
        "roofline",
        title,
        draw("roofline", title, partial(roofline, points=points, bandwidth=bandwidth, peaks=peaks)),
        "Circles are decoding a token, triangles reading a prompt. The sloping line is what memory allows, the level "
        f"ones what the processor does: {', '.join(limits)}, as measured there. Both axes are logarithmic.",
        legend({point.name: point.tone for point in points}),
        table=Table("How far from the roof", columns, table, left=2),
    )


def _operators(material: Material, profile: Profile, phase: Phase) -> Figure | None:
    """The operator types that take longest, of all graphs."""
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
    title = f"Time of {_PHASES[phase]} by operator"
    length = profile.breakdowns[0].prompt
    unit = "milliseconds of a call" + (f" of {length:,} tokens" if phase == "prefill" else " of one token")
    table = tuple(
        row(
            Cell(formatting.name(graph.graph), _tone(material, graph)),
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
        Table(title, ("Graph", "Operator", "Nodes", "Time", "Of the call"), table, left=2, folded=True),
        partial(shapes.bars, rows=rows, tones=_tones(material, profile), title=unit),
        "By ONNX Runtime's profiler, which itself takes some time.",
        _tones(material, profile),
    )


def _layers(material: Material, profile: Profile) -> Figure | None:
    """Time by layer of a graph's decode call."""
    rows = [
        {"name": formatting.name(graph.graph), "x": at, "y": layer.decode * 1e3}
        for graph in profile.breakdowns
        for at, layer in enumerate(layer for layer in graph.layers if layer.name.startswith("layer "))
    ]
    if not rows:
        return None
    title = "Time of a token by layer"
    table = tuple(
        row(
            Cell(formatting.name(graph.graph), _tone(material, graph)),
            formatting.name(layer.name),
            formatting.seconds(layer.decode),
            formatting.seconds(layer.prefill),
        )
        for graph in profile.breakdowns
        for layer in graph.layers
    )
    drawing = partial(
        shapes.lines,
        rows=rows,
        tones=_tones(material, profile),
        x="layer",
        y="milliseconds",
        log_x=False,
        measured=False,
        height=160,
    )
    return figure(
        "layers",
        Table(title, ("Graph", "Part", "A token", "A prompt"), table, left=2, folded=True),
        drawing,
        "Embedding, head and the rest are among the figures.",
        _tones(material, profile),
    )


def _tone(material: Material, graph: Breakdown) -> str:
    return material.tones.get(graph.graph, "soft")


def _tones(material: Material, profile: Profile) -> dict[str, str]:
    return {formatting.name(graph.graph): _tone(material, graph) for graph in profile.breakdowns}
