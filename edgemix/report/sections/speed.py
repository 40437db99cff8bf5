"""Speed on a machine: latency distributions, batches, speculation, loading."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from edgemix.report import formatting
from edgemix.report.blocks import Block, Cell, Figure, Note, Section, Table, row
from edgemix.report.charts import shapes
from edgemix.report.charts.drawing import figure

if TYPE_CHECKING:
    from edgemix.report.data import Material
    from edgemix.results.profile import Profile, Quantiles, Subject

MISSING = "Give a profile to see {what}: edgemix profile BUNDLE -o FILE, then edgemix report BUNDLE --profile FILE"
_RANGES = "The dot is the median, the tick the 90th percentile, the line ends at the 99th."
_UNSTEADY = " An open dot was not steady."


def speed_section(material: Material) -> Section:
    """What a profile says of time."""
    title = "Speed"
    profile = material.profile
    if profile is None:
        note = Note(MISSING.format(what="latency distributions, batches and loading"), missing=True)
        return Section("speed", title, "Not measured.", (note,))
    machine = profile.machine
    blocks: list[Block] = []
    if decoding := [subject for subject in profile.subjects if subject.decode]:
        blocks.append(_decode(material, decoding))
        if any(len(subject.decode) > 1 for subject in decoding):
            blocks.append(_contexts(material, decoding))
    if prefilling := [subject for subject in profile.subjects if subject.prefill]:
        blocks.append(_prefill(material, prefilling))
    if batched := [subject for subject in profile.subjects if subject.batches]:
        blocks.append(_batches(material, batched))
    if profile.variants:
        blocks.append(_variants(profile))
    blocks += [_loading(profile), *_per_token(material, profile), *(Note(note) for note in profile.notes)]
    return Section(
        "speed",
        title,
        f"{formatting.name(machine.processor)}, {machine.threads} thread{'s' if machine.threads > 1 else ''}, "
        f"{machine.provider}{'; measured in a hurry' if profile.quick else ''}.",
        tuple(blocks),
    )


def _tones(material: Material, subjects: list[Subject]) -> dict[str, str]:
    return {formatting.name(subject.name): material.tone_of(subject) for subject in subjects}


def _range(name: str, quantiles: Quantiles, scale: float = 1e3) -> dict[str, Any]:
    """A row of `shapes.ranges`."""
    return {
        "name": name,
        "p50": quantiles.p50 * scale,
        "p90": quantiles.p90 * scale,
        "p99": quantiles.p99 * scale,
        "steady": quantiles.steady,
        "label": formatting.digits(quantiles.p50 * scale),
    }


def _named(material: Material, subject: Subject) -> Cell:
    return Cell(formatting.name(subject.name), material.tone_of(subject))


def _times(quantiles: Quantiles) -> tuple[str, ...]:
    return (
        *(formatting.seconds(value) for value in (quantiles.p50, quantiles.p90, quantiles.p99)),
        formatting.share(quantiles.spread),
        f"{quantiles.count:,}" + ("" if quantiles.steady else " (not steady)"),
    )


_COLUMNS = ("Median", "90th percentile", "99th", "Spread", "Measurements")


def _ranged(
    id_: str, rows: list[dict[str, Any]], tones: dict[str, str], table: Table, *, unit: str = "milliseconds a token"
) -> Figure:
    """Quantiles as a figure, under the title of the table with them."""
    caption = _RANGES + ("" if all(each["steady"] for each in rows) else _UNSTEADY)
    chart = partial(shapes.ranges, rows=rows, tones=tones, title=unit)
    return figure(id_, table, chart, caption)


def _decode(material: Material, subjects: list[Subject]) -> Figure:
    context = subjects[0].decode[0].context
    title = f"Time per output token, behind {context:,} tokens"
    rows = [_range(formatting.name(subject.name), subject.decode[0].tpot) for subject in subjects]
    table = Table(
        title,
        ("", *_COLUMNS),
        tuple(row(_named(material, s), *_times(s.decode[0].tpot)) for s in subjects),
        folded=True,
    )
    return _ranged("tpot", rows, _tones(material, subjects), table)


def _contexts(material: Material, subjects: list[Subject]) -> Figure:
    title = "Time per output token, by context"
    rows = [
        {"name": formatting.name(subject.name), "x": each.context, "y": each.tpot.p50 * 1e3, "top": each.tpot.p99 * 1e3}
        for subject in subjects
        for each in subject.decode
    ]
    table = tuple(
        row(_named(material, subject), f"{each.context:,}", *_times(each.tpot))
        for subject in subjects
        for each in subject.decode
    )
    drawing = partial(
        shapes.lines,
        rows=rows,
        tones=_tones(material, subjects),
        x="tokens of context",
        y="milliseconds a token",
    )
    return figure(
        "context",
        Table(title, ("", "Context", *_COLUMNS), table, folded=True),
        drawing,
        "Medians; the whisker reaches to the 99th percentile. The horizontal axis is logarithmic.",
        _tones(material, subjects),
    )


def _prefill(material: Material, subjects: list[Subject]) -> Figure:
    """By prompt length; where there is only one, as a distribution."""
    lengths = {each.tokens for subject in subjects for each in subject.prefill}
    if len(lengths) == 1:
        return _first_token(material, subjects)
    title = "Time to first token, by prompt length"
    rows = [
        {"name": formatting.name(subject.name), "x": each.tokens, "y": each.ttft.p50, "top": each.ttft.p99}
        for subject in subjects
        for each in subject.prefill
    ]
    table = tuple(
        row(_named(material, subject), f"{each.tokens:,}", *_times(each.ttft))
        for subject in subjects
        for each in subject.prefill
    )
    drawing = partial(
        shapes.lines,
        rows=rows,
        tones=_tones(material, subjects),
        x="tokens of the prompt",
        y="seconds",
        log_y=True,
    )
    return figure(
        "ttft",
        Table(title, ("", "Prompt", *_COLUMNS), table, folded=True),
        drawing,
        "Medians; the whisker reaches to the 99th percentile. Both axes are logarithmic.",
        _tones(material, subjects),
    )


def _first_token(material: Material, subjects: list[Subject]) -> Figure:
    title = f"Time to first token, of a prompt of {subjects[0].prefill[0].tokens:,} tokens"
    rows = [_range(formatting.name(subject.name), subject.prefill[0].ttft) for subject in subjects]
    table = tuple(row(_named(material, subject), *_times(subject.prefill[0].ttft)) for subject in subjects)
    tones = _tones(material, subjects)
    return _ranged("ttft", rows, tones, Table(title, ("", *_COLUMNS), table, folded=True), unit="milliseconds")


def _batches(material: Material, subjects: list[Subject]) -> Figure:
    title = "Tokens a second, by batch size"
    rows = [
        {"name": formatting.name(subject.name), "x": each.size, "y": each.rate.p50}
        for subject in subjects
        for each in subject.batches
    ]
    table = tuple(
        row(
            _named(material, subject),
            f"{each.size:,}",
            formatting.digits(each.rate.p50),
            formatting.digits(each.rate.p50 / each.size),
        )
        for subject in subjects
        for each in subject.batches
    )
    drawing = partial(
        shapes.lines,
        rows=rows,
        tones=_tones(material, subjects),
        x="texts at once",
        y="tokens a second, of all of them",
    )
    return figure(
        "batches",
        Table(title, ("", "Texts", "Tokens/s", "Of each"), table, folded=True),
        drawing,
        "The horizontal axis is logarithmic.",
        _tones(material, subjects),
    )


def _variants(profile: Profile) -> Figure:
    title = "Ways to run the mixture, by threads and drafts"
    ordered = sorted(profile.variants, key=lambda variant: variant.tpot.p50)
    several = len({each.provider for each in ordered}) > 1
    names = [
        formatting.name(
            f"{f'{each.provider}, ' if several else ''}{each.threads} thread{'s' if each.threads > 1 else ''}, "
            f"{'no drafts' if each.speculation == 'off' else each.speculation}"
        )
        for each in ordered
    ]
    rows = [_range(name, each.tpot) for name, each in zip(names, ordered, strict=True)]
    table = tuple(row(name, *_times(each.tpot)) for name, each in zip(names, ordered, strict=True))
    return _ranged("variants", rows, dict.fromkeys(names, "m0"), Table(title, ("", *_COLUMNS), table, folded=True))


def _loading(profile: Profile) -> Table:
    loading = profile.loading
    cold = "not measured" if loading.cold is None else formatting.seconds(loading.cold.p50)
    rows = (
        row("Cold, files read from the disk", cold),
        row("Warm, files in memory already", formatting.seconds(loading.warm.p50)),
        row("Memory that it keeps", formatting.size(loading.resident)),
        row("Most memory, loading and generating", formatting.size(loading.peak)),
        row("Files", formatting.size(loading.files)),
    )
    return Table("Loading", ("", ""), rows)


def _per_token(material: Material, profile: Profile) -> list[Table]:
    """What is known of single tokens: speculation, time outside the graphs, energy."""
    found = []
    if drafting := [(s, s.speculation) for s in profile.subjects if s.speculation is not None]:
        rows = tuple(
            row(
                _named(material, subject),
                "" if figures.acceptance is None else formatting.share(figures.acceptance),
                formatting.digits(figures.drafted),
                formatting.digits(figures.calls),
                f"{figures.speedup:.2f}",
            )
            for subject, figures in drafting
        )
        columns = ("", "Drafts accepted", "Drafted a token", "Calls a token", "Times as fast as plain")
        found.append(Table("Generating in fewer calls", columns, rows))
    if outside := [(s, s.outside) for s in profile.subjects if s.outside is not None]:
        rows = tuple(
            row(
                _named(material, subject),
                *map(formatting.seconds, (figures.mixing, figures.sampling, figures.tokenizer, figures.other)),
            )
            for subject, figures in outside
        )
        columns = ("", "Mixing", "Sampling", "Tokenizer", "Other")
        found.append(Table("Time a token outside the graphs", columns, rows))
    if energy := [(s, s.energy) for s in profile.subjects if s.energy is not None]:
        rows = tuple(
            row(_named(material, subject), f"{formatting.digits(each.joules)} J", formatting.name(each.counter))
            for subject, each in energy
        )
        found.append(Table("Energy a token", ("", "Energy", "Counter"), rows))
    return found
