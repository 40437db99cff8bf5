"""The bundle's members and weights, their quantization and pruning losses, and the losses at other budgets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.formats import FORMAT_SPECS
from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, row
from edgemix.report.charts import basic
from edgemix.report.charts.drawing import figure, inline_data
from edgemix.report.charts.palette import light

if TYPE_CHECKING:
    from edgemix.bundle.manifest import BudgetFigures, MemberEntry, MixtureParity, QuantizationParity
    from edgemix.report.charts.drawing import Canvas
    from edgemix.report.data import ReportData


def bundle_section(data: ReportData) -> Section:
    """Return the section that the manifest alone fills."""
    manifest = data.manifest
    members = len(manifest.members)
    student = "" if manifest.student is None else ", and the student that was distilled from their mixture"
    blocks: list[Block] = [_members(data)]
    blocks += [
        Note(f"{formatting.name(entry.name)} failed a parity gate and was exported with --force.")
        for entry in manifest.graphs
        if entry.forced
    ]
    if members > 1:
        blocks.append(_weights(data))
    if quantized := [entry for entry in manifest.graphs if entry.quantization is not None]:
        blocks.append(_quantization(data, quantized))
    if any(entry.pruning is not None for entry in manifest.graphs):
        blocks.append(_pruning(data))
    if manifest.budget is not None:
        blocks.append(_budget(manifest.budget))
    blocks.append(_torch_parity(data))
    return Section(
        "bundle",
        "What is in the bundle",
        f"{'One member' if members == 1 else f'{members} members'}{student}. "
        f"Target: {manifest.target}; exported by edgemix {manifest.edgemix}.",
        tuple(blocks),
    )


def _members(data: ReportData) -> Table:
    rows = []
    for entry in data.manifest.graphs:
        source = entry.source
        model = formatting.name(f"{source.model} + {source.adapter}" if source.adapter else source.model)
        eighth = (
            f" ({formatting.share(entry.eight_bits)} at 8 bits)"
            if FORMAT_SPECS[entry.format].mixed_bits and entry.eight_bits
            else ""
        )
        rows.append(
            row(
                _name_cell(data, entry),
                entry.format + eighth,
                model,
                formatting.name(source.model_type),
                formatting.name(source.license or "not stated"),
                formatting.size(data.size_of([entry])),
                formatting.count(source.parameters),
                f"{entry.config.context:,}",
            )
        )
    columns = ("Member", "Format", "Model", "Type", "License", "Size", "Parameters", "Context")
    return Table("Members", columns, tuple(rows), left=5)


def _weights(data: ReportData) -> Figure:
    weights = data.manifest.weights
    sets = {"default": weights.default} | {f"for {formatting.name(name)}": own for name, own in weights.domains.items()}
    rows = [{"bar": bar, "name": name, "share": own[name]} for bar, own in sets.items() for name in data.members]
    colors = {name: data.colors[name] for name in data.members}
    how = {"uniform": "All members have the same weight.", "given": "The weights are given in the recipe."}
    table = Table(
        "Weights of the members in the mixture",
        ("Weights", *data.members),
        tuple(row(bar, *(f"{own[name]:.3f}" for name in data.members)) for bar, own in sets.items()),
        collapsed=True,
    )
    caption = how.get(weights.method, "Fitted to validation text: to all domains together, and to each domain alone.")
    return figure("weights", table, partial(basic.stacked_bar_chart, rows=rows, colors=colors), caption, colors)


def _quantization(data: ReportData, quantized: list[MemberEntry]) -> Figure:
    mixed = data.manifest.quantization
    parities: list[tuple[str, QuantizationParity | MixtureParity]] = [
        (entry.name, entry.quantization) for entry in quantized if entry.quantization is not None
    ]
    if mixed is not None:
        parities.append(("mixture", mixed))
    colors = data.colors | {"mixture": "text"}
    rows, table = [], []
    for name, parity in parities:
        limit = getattr(parity, "kl_limit", None)
        decoding = getattr(parity, "decode_kl", None)
        rows.append({"name": name, "kl": parity.kl, "limit": limit})
        table.append(
            row(
                Cell(formatting.name(name), colors[name]),
                f"{parity.kl:.4f}",
                "" if limit is None else f"{limit:g}",
                "" if decoding is None else f"{decoding:.4f}",
                formatting.share(parity.top1_disagreement, 1),
                f"{parity.perplexity_ratio:.4f}",
            )
        )
    columns = ("", "KL (nats)", "Limit", "KL, decoding", "Top-1 disagreement", "Perplexity ratio")
    return figure(
        "quantization",
        Table("Quantization loss", columns, tuple(table), collapsed=True),
        partial(_divergences, rows=rows, colors={name: colors[name] for name, _ in parities}),
        "KL divergence between the fp32 graph and the stored graph, in nats per token. The tick is the parity gate's "
        "limit; a graph above it is not exported."
        + ("" if mixed is None else " The mixture's loss is at most the weighted mean of its members' losses."),
    )


def _divergences(canvas: Canvas, rows: list[dict[str, Any]], colors: dict[str, str]) -> alt.TopLevelMixin:
    labeled = [{**each, "label": f"{each['kl']:.4f}"} for each in rows]
    highest = max(max(each["kl"], each["limit"] or 0.0) for each in rows)
    scale = alt.Scale(domain=[0, highest * 1.1 or 1.0], nice=False)
    base = alt.Chart(inline_data(labeled), width=canvas.width, height=basic.ROW_HEIGHT * len(rows)).encode(
        y=basic.category_axis(canvas, "name", [each["name"] for each in rows])
    )
    bars = base.mark_bar(size=8).encode(
        x=alt.X("kl:Q", scale=scale, title="nats per token"), color=basic.color_encoding(colors)
    )
    limits = base.transform_filter("isValid(datum.limit)").mark_tick(color=light("muted"), thickness=2, size=18)
    text = base.mark_text(align="left", dx=6, fontSize=11, color=light("muted")).encode(x="kl:Q", text="label:N")
    return alt.layer(bars, limits.encode(x="limit:Q"), text)


def _pruning(data: ReportData) -> Table:
    rows = tuple(
        row(
            _name_cell(data, entry),
            formatting.count(found.parameters_before),
            formatting.count(found.parameters_after),
            formatting.share(found.sparsity),
            f"{found.kl:.4f}",
            f"{found.perplexity_ratio:.4f}",
        )
        for entry in data.manifest.graphs
        if (found := entry.pruning) is not None
    )
    columns = ("", "Parameters before", "After", "Zeros", "KL (nats)", "Perplexity ratio")
    return Table("Pruning, against the unpruned model", columns, rows)


def _budget(budget: BudgetFigures) -> Figure:
    limits = ([] if budget.bytes is None else [formatting.size(budget.bytes)]) + (
        [] if budget.seconds is None else [f"{formatting.seconds(budget.seconds)} per token"]
    )
    rows = [{"x": point.bytes / 1e6, "y": point.loss, "chosen": point == budget.chosen} for point in budget.curve]
    table = tuple(
        row(
            formatting.size(point.bytes),
            "" if point.seconds is None else formatting.seconds(point.seconds),
            f"{point.loss:.5f}",
            "chosen" if point == budget.chosen else "",
        )
        for point in budget.curve
    )
    columns = ("Size", "Time per token", "Estimated KL (nats)", "")
    return figure(
        "budget",
        Table("Loss at other budgets", columns, table, left=0, collapsed=True),
        partial(_curve, rows=rows),
        "Estimated KL divergence between the fp32 mixture and the stored one, by the bundle's size. The limit was "
        f"{formatting.join(limits)}; the large dot is the chosen one.",
    )


def _curve(canvas: Canvas, rows: list[dict[str, Any]]) -> alt.TopLevelMixin:
    base = alt.Chart(inline_data(rows), width=canvas.width, height=200).encode(
        x=alt.X("x:Q", title="MB", scale=alt.Scale(zero=False)), y=alt.Y("y:Q", title="nats per token")
    )
    line = base.mark_line(color=light("m0"))
    points = base.mark_point(size=40, fill=light("background"), stroke=light("m0"), strokeWidth=1.5)
    chosen = base.transform_filter("datum.chosen").mark_point(size=130, fill=light("m0"))
    return alt.layer(line, points, chosen)


def _torch_parity(data: ReportData) -> Table:
    rows = []
    for entry in data.manifest.graphs:
        worst = max(entry.parity.prefill, entry.parity.decode, entry.parity.padded_batch)
        rows.append(
            row(
                _name_cell(data, entry),
                entry.config.exporter,
                f"{worst:.1e}",
                f"{entry.parity.limit:.0e}",
                "yes" if entry.forced else "no",
            )
        )
    columns = ("", "Exporter", "Largest difference (nats)", "Limit", "Forced")
    return Table("fp32 graphs against PyTorch, before quantization", columns, tuple(rows), left=2, collapsed=True)


def _name_cell(data: ReportData, entry: MemberEntry) -> Cell:
    return Cell(formatting.name(entry.name), data.colors[entry.name])
