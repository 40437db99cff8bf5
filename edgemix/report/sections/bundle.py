"""What the bundle is: its members, their weights, what quantisation cost, and what another budget would have."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import altair as alt

from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, legend, row
from edgemix.report.charts import shapes
from edgemix.report.charts.drawing import data, draw
from edgemix.report.charts.palette import light

if TYPE_CHECKING:
    from edgemix.bundle.manifest import BudgetFigures, MemberEntry
    from edgemix.report.charts.drawing import Canvas
    from edgemix.report.data import Material


def bundle_section(material: Material) -> Section:
    """From the manifest alone."""
    manifest = material.manifest
    members = len(manifest.members)
    student = "" if manifest.student is None else ", and the student that was distilled from them"
    blocks: list[Block] = [_members(material)]
    blocks += [
        Note(f"{formatting.name(entry.name)} was let past a gate that it failed (--force).")
        for entry in manifest.graphs
        if entry.forced
    ]
    if members > 1:
        blocks.append(_weights(material))
    if quantised := [entry for entry in manifest.graphs if entry.quantization is not None]:
        blocks.append(_quantisation(material, quantised))
    if any(entry.pruning is not None for entry in manifest.graphs):
        blocks.append(_pruning(material))
    if manifest.budget is not None:
        blocks.append(_budget(manifest.budget))
    blocks.append(_torch(material))
    return Section(
        "bundle",
        "What is in the bundle",
        f"{'One member' if members == 1 else f'{members} members'}{student}. "
        f"Target {manifest.target}, made by edgemix {manifest.edgemix}.",
        tuple(blocks),
    )


def _members(material: Material) -> Table:
    rows = []
    for entry in material.manifest.graphs:
        source = entry.source
        model = formatting.name(f"{source.model} + {source.adapter}" if source.adapter else source.model)
        eighth = (
            f" ({formatting.share(entry.eight_bits)} at 8 bits)" if entry.format == "int4" and entry.eight_bits else ""
        )
        rows.append(
            row(
                _named(material, entry),
                entry.format + eighth,
                model,
                formatting.name(source.model_type),
                formatting.name(source.license or "not stated"),
                formatting.size(material.size_of([entry])),
                formatting.count(source.parameters),
                f"{entry.config.context:,}",
            )
        )
    columns = ("Member", "Format", "Model", "Type", "License", "Size", "Parameters", "Context")
    return Table("Members", columns, tuple(rows), left=5)


def _weights(material: Material) -> Figure:
    weights = material.manifest.weights
    sets = {"default": weights.default} | {f"for {formatting.name(name)}": own for name, own in weights.domains.items()}
    rows = [{"bar": bar, "name": name, "share": own[name]} for bar, own in sets.items() for name in material.members]
    tones = {name: material.tones[name] for name in material.members}
    title = "Weights of the members in the mixture"
    how = {"uniform": "All members weigh the same.", "given": "The recipe gave the weights."}
    return Figure(
        "weights",
        title,
        draw("weights", title, partial(shapes.shares, rows=rows, tones=tones)),
        how.get(weights.method, "Fitted to validation text: to all of it, and to each domain alone."),
        legend(tones),
        table=Table(
            "Weights",
            ("Weights", *material.members),
            tuple(row(bar, *(f"{own[name]:.3f}" for name in material.members)) for bar, own in sets.items()),
            folded=True,
        ),
    )


def _quantisation(material: Material, quantised: list[MemberEntry]) -> Figure:
    rows: list[dict[str, Any]] = []
    table = []
    for entry in quantised:
        found = entry.quantization
        if found is None:
            continue
        rows.append({"name": entry.name, "kl": found.kl, "limit": found.kl_limit})
        decoding = "" if found.decode_kl is None else f"{found.decode_kl:.4f}"
        table.append(
            row(
                _named(material, entry),
                f"{found.kl:.4f}",
                f"{found.kl_limit:g}",
                decoding,
                formatting.share(found.top1_disagreement, 1),
                f"{found.perplexity_ratio:.4f}",
            )
        )
    mixed = material.manifest.quantization
    if mixed is not None:
        rows.append({"name": "mixture", "kl": mixed.kl, "limit": None})
        table.append(
            row(
                Cell("mixture", "ink"),
                f"{mixed.kl:.4f}",
                "",
                "",
                formatting.share(mixed.top1_disagreement, 1),
                f"{mixed.perplexity_ratio:.4f}",
            )
        )
    tones = material.tones | {"mixture": "ink"}
    title = "What quantisation costs"
    return Figure(
        "quantisation",
        title,
        draw(
            "quantisation",
            title,
            partial(_divergences, rows=rows, tones={row["name"]: tones[row["name"]] for row in rows}),
        ),
        "KL divergence of the stored graph from the fp32 graph, in nats a token. The tick is the gate's limit: beyond "
        "it no bundle is made."
        + ("" if mixed is None else " Of what its members lose, the mixture loses no more than their weighted mean."),
        table=Table(
            "Stored graphs against fp32",
            ("", "KL (nats)", "Limit", "KL decoding", "Flipped tokens", "Perplexity ratio"),
            tuple(table),
            folded=True,
        ),
    )


def _divergences(canvas: Canvas, rows: list[dict[str, Any]], tones: dict[str, str]) -> alt.TopLevelMixin:
    labelled = [{**each, "label": f"{each['kl']:.4f}"} for each in rows]
    highest = max(max(each["kl"], each["limit"] or 0.0) for each in rows)
    scale = alt.Scale(domain=[0, highest * 1.1 or 1.0], nice=False)
    base = alt.Chart(data(labelled), width=canvas.width, height=shapes.BAND * len(rows)).encode(
        y=shapes.bands(canvas, "name", [each["name"] for each in rows])
    )
    bars = base.mark_bar(size=8).encode(x=alt.X("kl:Q", scale=scale, title="nats a token"), color=shapes.colour(tones))
    limits = base.transform_filter("isValid(datum.limit)").mark_tick(color=light("soft"), thickness=2, size=18)
    text = base.mark_text(align="left", dx=6, fontSize=11, color=light("soft")).encode(x="kl:Q", text="label:N")
    return alt.layer(bars, limits.encode(x="limit:Q"), text)


def _pruning(material: Material) -> Table:
    rows = tuple(
        row(
            _named(material, entry),
            formatting.count(found.parameters_before),
            formatting.count(found.parameters_after),
            formatting.share(found.sparsity),
            f"{found.kl:.4f}",
            f"{found.perplexity_ratio:.4f}",
        )
        for entry in material.manifest.graphs
        if (found := entry.pruning) is not None
    )
    columns = ("", "Parameters before", "After", "Zeros", "KL (nats)", "Perplexity ratio")
    return Table("Pruned, against the model before it", columns, rows)


def _budget(budget: BudgetFigures) -> Figure:
    title = "What other budgets would lose"
    limits = ([] if budget.bytes is None else [formatting.size(budget.bytes)]) + (
        [] if budget.seconds is None else [f"{formatting.seconds(budget.seconds)} a token"]
    )
    rows = [{"x": point.bytes / 1e6, "y": point.loss, "chosen": point == budget.chosen} for point in budget.curve]
    return Figure(
        "budget",
        title,
        draw("budget", title, partial(_curve, rows=rows)),
        "Estimated KL divergence of the mixture from fp32, by the bundle's size. The limit was "
        f"{formatting.listed(limits)}; the full dot was chosen.",
        table=Table(
            title,
            ("Size", "Seconds a token", "Estimated KL (nats)", ""),
            tuple(
                row(
                    formatting.size(point.bytes),
                    "" if point.seconds is None else formatting.seconds(point.seconds),
                    f"{point.loss:.5f}",
                    "chosen" if point == budget.chosen else "",
                )
                for point in budget.curve
            ),
            left=0,
            folded=True,
        ),
    )


def _curve(canvas: Canvas, rows: list[dict[str, Any]]) -> alt.TopLevelMixin:
    base = alt.Chart(data(rows), width=canvas.width, height=200).encode(
        x=alt.X("x:Q", title="MB", scale=alt.Scale(zero=False)), y=alt.Y("y:Q", title="nats a token")
    )
    line = base.mark_line(color=light("m0"))
    points = base.mark_point(size=40, fill=light("paper"), stroke=light("m0"), strokeWidth=1.5)
    chosen = base.transform_filter("datum.chosen").mark_point(size=130, fill=light("m0"))
    return alt.layer(line, points, chosen)


def _torch(material: Material) -> Table:
    rows = []
    for entry in material.manifest.graphs:
        worst = max(entry.parity.prefill, entry.parity.decode, entry.parity.padded_batch)
        rows.append(
            row(
                _named(material, entry),
                entry.config.exporter,
                f"{worst:.1e}",
                f"{entry.parity.limit:.0e}",
                "yes" if entry.forced else "no",
            )
        )
    columns = ("", "Exporter", "Largest difference (nats)", "Limit", "Forced")
    return Table("Graphs against torch, before quantisation", columns, tuple(rows), left=2, folded=True)


def _named(material: Material, entry: MemberEntry) -> Cell:
    return Cell(formatting.name(entry.name), material.tones[entry.name])
