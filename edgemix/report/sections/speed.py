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
    from edgemix.results.profile import Profile, Quantiles, Subject

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
    if decoding := [subject for subject in profile.subjects if subject.decode]:
        blocks.append(_decode(data, decoding))
        if any(len(subject.decode) > 1 for subject in decoding):
            blocks.append(_contexts(data, decoding))
    if prefilling := [subject for subject in profile.subjects if subject.prefill]:
        blocks.append(_prefill(data, prefilling))
    if batched := [subject for subject in profile.subjects if subject.batches]:
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


def _colors(data: ReportData, subjects: list[Subject]) -> dict[str, str]:
    return {formatting.name(subject.name): data.color_of(subject) for subject in subjects}


def _quantile_row(name: str, quantiles: Quantiles, scale: float = 1e3) -> dict[str, Any]:
    """Return a row of `basic.quantile_chart`."""
    return {
        "name": name,
        "p50": quantiles.p50 * scale,
        "p90": quantiles.p90 * scale,
        "p99": quantiles.p99 * scale,
        "steady": quantiles.steady,
        "label": formatting.digits(quantiles.p50 * scale),
    }


def _name_cell(data: ReportData, subject: Subject) -> Cell:
    return Cell(formatting.name(subject.name), data.color_of(subject))


def _times(quantiles: Quantiles) -> tuple[str, ...]:
    return (
        *(formatting.seconds(value) for value in (quantiles.p50, quantiles.p90, quantiles.p99)),
        formatting.share(quantiles.spread),
        f"{quantiles.count:,}" + ("" if quantiles.steady else " (not stable)"),
    )


_COLUMNS = ("Median", "90th percentile", "99th", "Spread", "Measurements")


def _quantile_figure(
    id_: str, rows: list[dict[str, Any]], colors: dict[str, str], table: Table, *, unit: str = "milliseconds per token"
) -> Figure:
    """Return a quantile chart under the title of the table with its numbers."""
    caption = _QUANTILES + ("" if all(each["steady"] for each in rows) else _UNSTABLE)
    chart = partial(basic.quantile_chart, rows=rows, colors=colors, title=unit)
    return figure(id_, table, chart, caption)


def _decode(data: ReportData, subjects: list[Subject]) -> Figure:
    context = subjects[0].decode[0].context
    title = f"Time per output token, after {context:,} tokens of context"
    rows = [_quantile_row(formatting.name(subject.name), subject.decode[0].tpot) for subject in subjects]
    table = Table(
        title,
        ("", *_COLUMNS),
        tuple(row(_name_cell(data, s), *_times(s.decode[0].tpot)) for s in subjects),
        collapsed=True,
    )
    return _quantile_figure("tpot", rows, _colors(data, subjects), table)


def _contexts(data: ReportData, subjects: list[Subject]) -> Figure:
    title = "Time per output token, by context"
    rows = [
        {"name": formatting.name(subject.name), "x": each.context, "y": each.tpot.p50 * 1e3, "top": each.tpot.p99 * 1e3}
        for subject in subjects
        for each in subject.decode
    ]
    table = tuple(
        row(_name_cell(data, subject), f"{each.context:,}", *_times(each.tpot))
        for subject in subjects
        for each in subject.decode
    )
    drawing = partial(
        basic.line_chart,
        rows=rows,
        colors=_colors(data, subjects),
        x="tokens of context",
        y="milliseconds per token",
    )
    return figure(
        "context",
        Table(title, ("", "Context", *_COLUMNS), table, collapsed=True),
        drawing,
        "Medians; the whisker reaches the 99th percentile. The horizontal axis is logarithmic.",
        _colors(data, subjects),
    )


def _prefill(data: ReportData, subjects: list[Subject]) -> Figure:
    """Return time to first token by prompt length; with one length, its distribution."""
    lengths = {each.tokens for subject in subjects for each in subject.prefill}
    if len(lengths) == 1:
        return _first_token(data, subjects)
    title = "Time to first token, by prompt length"
    rows = [
        {"name": formatting.name(subject.name), "x": each.tokens, "y": each.ttft.p50, "top": each.ttft.p99}
        for subject in subjects
        for each in subject.prefill
    ]
    table = tuple(
        row(_name_cell(data, subject), f"{each.tokens:,}", *_times(each.ttft))
        for subject in subjects
        for each in subject.prefill
    )
    drawing = partial(
        basic.line_chart,
        rows=rows,
        colors=_colors(data, subjects),
        x="prompt tokens",
        y="seconds",
        log_y=True,
    )
    return figure(
        "ttft",
        Table(title, ("", "Prompt", *_COLUMNS), table, collapsed=True),
        drawing,
        "Medians; the whisker reaches the 99th percentile. Both axes are logarithmic.",
        _colors(data, subjects),
    )


def _first_token(data: ReportData, subjects: list[Subject]) -> Figure:
    title = f"Time to first token, for a prompt of {subjects[0].prefill[0].tokens:,} tokens"
    rows = [_quantile_row(formatting.name(subject.name), subject.prefill[0].ttft) for subject in subjects]
    table = tuple(row(_name_cell(data, subject), *_times(subject.prefill[0].ttft)) for subject in subjects)
    colors = _colors(data, subjects)
    return _quantile_figure(
        "ttft", rows, colors, Table(title, ("", *_COLUMNS), table, collapsed=True), unit="milliseconds"
    )


def _batches(data: ReportData, subjects: list[Subject]) -> Figure:
    title = "Throughput by batch size"
    rows = [
        {"name": formatting.name(subject.name), "x": each.size, "y": each.rate.p50}
        for subject in subjects
        for each in subject.batches
    ]
    table = tuple(
        row(
            _name_cell(data, subject),
            f"{each.size:,}",
            formatting.digits(each.rate.p50),
            formatting.digits(each.rate.p50 / each.size),
        )
        for subject in subjects
        for each in subject.batches
    )
    drawing = partial(
        basic.line_chart,
        rows=rows,
        colors=_colors(data, subjects),
        x="batch size",
        y="tokens per second, whole batch",
    )
    return figure(
        "batches",
        Table(title, ("", "Batch size", "Tokens/s", "Tokens/s per text"), table, collapsed=True),
        drawing,
        "The horizontal axis is logarithmic.",
        _colors(data, subjects),
    )


def _variants(profile: Profile) -> Figure:
    title = "Configurations of the mixture, by threads and drafts"
    ordered = sorted(profile.variants, key=lambda variant: variant.tpot.p50)
    several = len({each.provider for each in ordered}) > 1
    names = [
        formatting.name(
            f"{f'{each.provider}, ' if several else ''}{each.threads} thread{'s' if each.threads > 1 else ''}, "
            f"{'no drafts' if each.speculation == 'off' else each.speculation}"
        )
        for each in ordered
    ]
    rows = [_quantile_row(name, each.tpot) for name, each in zip(names, ordered, strict=True)]
    table = tuple(row(name, *_times(each.tpot)) for name, each in zip(names, ordered, strict=True))
    return _quantile_figure(
        "variants", rows, dict.fromkeys(names, "m0"), Table(title, ("", *_COLUMNS), table, collapsed=True)
    )


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
    if drafting := [(s, s.speculation) for s in profile.subjects if s.speculation is not None]:
        rows = tuple(
            row(
                _name_cell(data, subject),
                "" if figures.acceptance is None else formatting.share(figures.acceptance),
                formatting.digits(figures.drafted),
                formatting.digits(figures.calls),
                f"{figures.speedup:.2f}",
            )
            for subject, figures in drafting
        )
        columns = ("", "Acceptance rate", "Drafted per token", "Calls per token", "Speedup over the plain loop")
        found.append(Table("Speculative decoding", columns, rows))
    if outside := [(s, s.outside) for s in profile.subjects if s.outside is not None]:
        rows = tuple(
            row(
                _name_cell(data, subject),
                *map(formatting.seconds, (figures.mixing, figures.sampling, figures.tokenizer, figures.other)),
            )
            for subject, figures in outside
        )
        columns = ("", "Mixing", "Sampling", "Tokenizer", "Other")
        found.append(Table("Overhead per token outside ONNX Runtime", columns, rows))
    if energy := [(s, s.energy) for s in profile.subjects if s.energy is not None]:
        rows = tuple(
            row(_name_cell(data, subject), f"{formatting.digits(each.joules)} J", formatting.name(each.counter))
            for subject, each in energy
        )
        found.append(Table("Energy per token", ("", "Energy", "Counter"), rows))
    return found
