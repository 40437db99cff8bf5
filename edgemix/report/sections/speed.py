"""Speed on a machine: latency distributions, batches, speculative decoding, loading."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, row
from edgemix.report.charts import basic
from edgemix.report.charts.drawing import figure

if TYPE_CHECKING:
    from edgemix.report.data import ReportData
    from edgemix.results.profile import Profile, Quantiles, TargetResult

MISSING = "Give a profile to see {what}: edgemix profile BUNDLE -o FILE, then edgemix report BUNDLE --profile FILE"
_QUANTILES = "The dot is the median, the tick the 90th percentile, the line ends at the 99th."
_UNSTABLE = " An open dot is a measurement that did not stabilize."


def speed_section(data: ReportData) -> Section:
    """Return the section with a profile's times."""
    title = "Speed"
    profile = data.profile
    if profile is None:
        note = Note(MISSING.format(what="latency distributions, batches and loading"), missing=True)
        return Section("speed", title, "Not measured.", (note,))
    machine = profile.machine
    blocks: list[Block] = []
    if decoding := [result for result in profile.results if result.decode]:
        blocks.append(_decode(data, decoding))
        if any(len(result.decode) > 1 for result in decoding):
            blocks.append(_contexts(data, decoding))
    if prefilling := [result for result in profile.results if result.prefill]:
        blocks.append(_prefill(data, prefilling))
    if batched := [result for result in profile.results if result.batches]:
        blocks.append(_batches(data, batched))
    if profile.variants:
        blocks.append(_variants(profile))
    blocks += [_loading(profile), *_per_token(data, profile), *(Note(note) for note in profile.notes)]
    return Section(
        "speed",
        title,
        f"{formatting.name(machine.processor)}, {machine.threads} thread{'s' if machine.threads > 1 else ''}, "
        f"{machine.provider}{'; measured with --quick' if profile.quick else ''}.",
        tuple(blocks),
    )


def _name_cell(data: ReportData, result: TargetResult) -> Cell:
    return Cell(formatting.name(result.name), data.color_of(result))


def _times(quantiles: Quantiles) -> tuple[str, ...]:
    return (
        *(formatting.seconds(value) for value in (quantiles.p50, quantiles.p90, quantiles.p99)),
        formatting.share(quantiles.spread),
        f"{quantiles.count:,}" + ("" if quantiles.stable else " (not stable)"),
    )


_COLUMNS = ("Median", "90th percentile", "99th", "Spread", "Measurements")


def _quantile_figure(
    id_: str, title: str, measurements: list[tuple[Cell, Quantiles]], *, unit: str = "milliseconds per token"
) -> Figure:
    """Return a quantile chart with a row for each measurement; a row's cell has its name and color."""
    rows = [
        {
            "name": cell.text,
            "p50": quantiles.p50 * 1e3,
            "p90": quantiles.p90 * 1e3,
            "p99": quantiles.p99 * 1e3,
            "stable": quantiles.stable,
            "label": formatting.digits(quantiles.p50 * 1e3),
        }
        for cell, quantiles in measurements
    ]
    table = tuple(row(cell, *_times(quantiles)) for cell, quantiles in measurements)
    colors = {cell.text: cell.color for cell, _ in measurements}
    return figure(
        id_,
        Table(title, ("", *_COLUMNS), table, collapsed=True),
        partial(basic.quantile_chart, rows=rows, colors=colors, title=unit),
        _QUANTILES + ("" if all(each["stable"] for each in rows) else _UNSTABLE),
    )


def _line_figure(
    id_: str,
    table: Table,
    measurements: list[tuple[Cell, int, Quantiles]],
    *,
    scale: float = 1.0,
    whiskers: bool = True,
    **axes: Any,
) -> Figure:
    """Return a line chart of medians by size.

    Args:
        id_: The figure's id.
        table: The chart's numbers.
        measurements: A cell with name and color, a size above zero, and the measurement at that size.
        scale: Factor of the medians.
        whiskers: Whether to draw whiskers to the 99th percentile.
        axes: The axes' titles `x` and `y`, and `log_y`, as in `basic.line_chart`.
    """
    rows: list[dict[str, Any]] = [
        {"name": cell.text, "x": size, "y": quantiles.p50 * scale}
        | ({"top": quantiles.p99 * scale} if whiskers else {})
        for cell, size, quantiles in measurements
    ]
    colors = {cell.text: cell.color for cell, _, _ in measurements}
    caption = "Medians; the whisker reaches the 99th percentile. " if whiskers else "Medians. "
    caption += "Both axes are logarithmic." if axes.get("log_y") else "The horizontal axis is logarithmic."
    return figure(id_, table, partial(basic.line_chart, rows=rows, colors=colors, **axes), caption, colors)


def _decode(data: ReportData, results: list[TargetResult]) -> Figure:
    title = f"Time per output token, after {results[0].decode[0].context:,} tokens of context"
    return _quantile_figure("tpot", title, [(_name_cell(data, each), each.decode[0].tpot) for each in results])


def _contexts(data: ReportData, results: list[TargetResult]) -> Figure:
    measured = [(_name_cell(data, result), each.context, each.tpot) for result in results for each in result.decode]
    rows = tuple(row(cell, f"{context:,}", *_times(tpot)) for cell, context, tpot in measured)
    table = Table("Time per output token, by context", ("", "Context", *_COLUMNS), rows, collapsed=True)
    return _line_figure("context", table, measured, scale=1e3, x="tokens of context", y="milliseconds per token")


def _prefill(data: ReportData, results: list[TargetResult]) -> Figure:
    """Return time to first token by prompt length; with one length, its distribution."""
    measured = [(_name_cell(data, result), each.tokens, each.ttft) for result in results for each in result.prefill]
    lengths = {tokens for _, tokens, _ in measured}
    if len(lengths) == 1:
        title = f"Time to first token, for a prompt of {lengths.pop():,} tokens"
        return _quantile_figure("ttft", title, [(cell, ttft) for cell, _, ttft in measured], unit="milliseconds")
    rows = tuple(row(cell, f"{tokens:,}", *_times(ttft)) for cell, tokens, ttft in measured)
    table = Table("Time to first token, by prompt length", ("", "Prompt", *_COLUMNS), rows, collapsed=True)
    return _line_figure("ttft", table, measured, x="prompt tokens", y="seconds", log_y=True)


def _batches(data: ReportData, results: list[TargetResult]) -> Figure:
    measured = [(_name_cell(data, result), each.size, each.rate) for result in results for each in result.batches]
    rows = tuple(
        row(cell, f"{size:,}", formatting.digits(rate.p50), formatting.digits(rate.p50 / size))
        for cell, size, rate in measured
    )
    columns = ("", "Batch size", "Tokens/s", "Tokens/s per text")
    table = Table("Throughput by batch size", columns, rows, collapsed=True)
    return _line_figure("batches", table, measured, whiskers=False, x="batch size", y="tokens per second, whole batch")


def _variants(profile: Profile) -> Figure:
    ordered = sorted(profile.variants, key=lambda variant: variant.tpot.p50)
    several = len({each.provider for each in ordered}) > 1
    names = [
        formatting.name(
            f"{f'{each.provider}, ' if several else ''}{each.threads} thread{'s' if each.threads > 1 else ''}, "
            f"{'no drafts' if each.speculation == 'off' else each.speculation}"
        )
        for each in ordered
    ]
    title = "Configurations of the mixture, by threads and drafts"
    measured = [(Cell(name, "m0"), each.tpot) for name, each in zip(names, ordered, strict=True)]
    return _quantile_figure("variants", title, measured)


def _loading(profile: Profile) -> Table:
    loading = profile.loading
    cold = "not measured" if loading.cold is None else formatting.seconds(loading.cold.p50)
    rows = (
        row("Cold: files read from disk", cold),
        row("Warm: files in the page cache", formatting.seconds(loading.warm.p50)),
        row("Resident memory", formatting.size(loading.resident)),
        row("Peak memory, loading and generating", formatting.size(loading.peak)),
        row("Files", formatting.size(loading.files)),
    )
    return Table("Loading", ("", ""), rows)


def _per_token(data: ReportData, profile: Profile) -> list[Table]:
    """Return the tables of figures per token: speculative decoding, overhead outside the graphs, energy."""
    found = []
    if drafting := [(s, s.speculation) for s in profile.results if s.speculation is not None]:
        rows = tuple(
            row(
                _name_cell(data, result),
                "" if figures.acceptance is None else formatting.share(figures.acceptance),
                formatting.digits(figures.drafted),
                formatting.digits(figures.calls),
                f"{figures.speedup:.2f}",
            )
            for result, figures in drafting
        )
        columns = ("", "Acceptance rate", "Drafted per token", "Calls per token", "Speedup over the plain loop")
        found.append(Table("Speculative decoding", columns, rows))
    if outside := [(s, s.overhead) for s in profile.results if s.overhead is not None]:
        rows = tuple(
            row(
                _name_cell(data, result),
                *map(formatting.seconds, (figures.mixing, figures.sampling, figures.tokenizer, figures.other)),
            )
            for result, figures in outside
        )
        columns = ("", "Mixing", "Sampling", "Tokenizer", "Other")
        found.append(Table("Overhead per token outside ONNX Runtime", columns, rows))
    if energy := [(s, s.energy) for s in profile.results if s.energy is not None]:
        rows = tuple(
            row(_name_cell(data, result), f"{formatting.digits(each.joules)} J", formatting.name(each.counter))
            for result, each in energy
        )
        found.append(Table("Energy per token", ("", "Energy", "Counter"), rows))
    return found
