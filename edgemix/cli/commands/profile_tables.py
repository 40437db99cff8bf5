"""Print a profile, or the comparison of two profiles, as tables."""

from __future__ import annotations

import math
from itertools import chain, groupby, repeat
from textwrap import fill
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from edgemix.cli.console import Console
    from edgemix.results.profile import Breakdown, Loading, Machine, Profile, Quantiles, TargetResult
    from edgemix.results.profile_comparison import Comparison, Ratio

_MAX_OPERATORS = 8
_MAX_GRAPHS = 5
_MAX_NAME_LENGTH = 24
"""Characters of a name that are shown at most."""


def show_profile(console: Console, profile: Profile) -> None:
    """Print a profile: the machine in a few lines, then a table for each kind of measurement."""
    _show_machine(console, profile)
    _show_speed(console, profile.results)
    _show_lengths(console, profile.results)
    _show_loading(console, profile)
    _show_overhead(console, profile.results)
    if profile.breakdowns:
        _show_operators(console, profile.breakdowns[:_MAX_GRAPHS])
    _show_roofline(console, profile.results)
    _show_variants(console, profile)
    for note in profile.notes:
        console.line(fill(f"Note: {note}.", 80, subsequent_indent="  "))
    if profile.notes:
        console.line()


def _show_machine(console: Console, profile: Profile) -> None:
    machine = profile.machine
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''} of {machine.cores} cores"
    console.heading(f"{profile.bundle} on {machine.processor}")
    console.line(f"{machine.provider}, {threads}, ONNX Runtime {machine.onnxruntime}, {machine.platform}")
    if limits := _limits(machine):
        console.line(f"Peak rates: {limits}")
    how = "with --quick " if profile.quick else ""
    weights = f"; weights: {profile.weights}" if profile.weights else ""
    console.line(f"Measured {how}in {number(profile.seconds)} s, {profile.created}{weights}")
    console.line()


def _limits(machine: Machine) -> str:
    limits = [
        (machine.bandwidth, "GB/s from memory"),
        (machine.fp32_peak, "G multiply-adds/s in fp32"),
        (machine.int8_peak, "in int8"),
    ]
    return ", ".join(f"{number(value / 1e9)} {unit}" for value, unit in limits if value)


def _show_speed(console: Console, results: Sequence[TargetResult]) -> None:
    """Print decoding speed after the shortest context, and what speculative decoding adds."""
    timed = [result for result in results if result.decode]
    if not timed:
        return
    energy = any(result.energy for result in timed)
    context = timed[0].decode[0].context
    console.table(
        f"Decoding after {context} tokens, ms per token",
        ("", "Tokens/s", "p50", "p90", "p99", "Spread", *(("J/token",) if energy else ())),
        [
            (
                short(result.name),
                _mark_unstable(number(1 / tpot.p50 if tpot.p50 else math.nan), tpot),
                *(number(1e3 * value) for value in (tpot.p50, tpot.p90, tpot.p99)),
                percent(tpot.spread),
                *((number(result.energy.joules) if result.energy else "",) if energy else ()),
            )
            for result in timed
            for tpot in [result.decode[0].tpot]
        ],
    )
    for result in timed:
        if (speculation := result.speculation) is not None:
            accepted = f"{percent(speculation.acceptance)} accepted" if speculation.acceptance is not None else "none"
            console.line(f"Speculative decoding is {number(speculation.speedup)} times as fast as the plain loop.")
            console.line(
                f"Per token: {number(speculation.calls)} calls of members' graphs, {number(speculation.drafted)} draft "
                f"tokens ({accepted})."
            )
            console.line()


def _show_lengths(console: Console, results: Sequence[TargetResult]) -> None:
    """Print time to first token by prompt length, time per token by context length, and throughput by batch size."""

    def table(title: str, sizes: Iterable[int], cell: Callable[[TargetResult, int], str]) -> None:
        columns = sorted(set(sizes))[:8]
        rows = [(short(result.name), *(cell(result, size) for size in columns)) for result in results]
        if columns:
            console.table(title, ("", *(f"{size:,}" for size in columns)), [row for row in rows if any(row[1:])])

    def ttft(result: TargetResult, size: int) -> str:
        return next((_mark_unstable(number(1e3 * p.ttft.p50), p.ttft) for p in result.prefill if p.tokens == size), "")

    def tpot(result: TargetResult, size: int) -> str:
        return next((_mark_unstable(number(1e3 * d.tpot.p50), d.tpot) for d in result.decode if d.context == size), "")

    def rate(result: TargetResult, size: int) -> str:
        return next((_mark_unstable(number(b.rate.p50), b.rate) for b in result.batches if b.size == size), "")

    table("Time to first token, ms, by prompt length", _sizes(results, "prefill", "tokens"), ttft)
    contexts = _sizes(results, "decode", "context")
    if len(set(contexts)) > 1:
        table("Time per token, ms, by context length", contexts, tpot)
    table("Tokens/s, by batch size", _sizes(results, "batches", "size"), rate)


def _sizes(results: Iterable[TargetResult], part: str, name: str) -> list[int]:
    return [getattr(each, name) for result in results for each in getattr(result, part)]


def _show_loading(console: Console, profile: Profile) -> None:
    rows = [("all members", profile.loading)]
    rows += [(result.name, result.loading) for result in profile.results if result.loading is not None]

    def row(name: str, loading: Loading) -> tuple[str, ...]:
        cold = _mark_unstable(number(loading.cold.p50), loading.cold) if loading.cold else ""
        sizes = (megabytes(size) for size in (loading.files, loading.resident, loading.peak))
        return short(name), cold, _mark_unstable(number(loading.warm.p50), loading.warm), *sizes

    console.table(
        "Loading, in a new process each time: seconds, MB",
        ("", "Cold", "Warm", "Files", "Resident", "Peak"),
        [row(name, loading) for name, loading in rows],
    )


def _show_overhead(console: Console, results: Sequence[TargetResult]) -> None:
    """Print the time per token that is spent outside ONNX Runtime."""
    rows = []
    for result in results:
        if (overhead := result.overhead) is None or not result.decode:
            continue
        parts = (overhead.mixing, overhead.sampling, overhead.tokenizer, overhead.other)
        share = sum(parts) / result.decode[0].tpot.p50 if result.decode[0].tpot.p50 else math.nan
        rows.append((short(result.name), *(number(1e3 * part) for part in parts), percent(share)))
    if rows:
        columns = ("", "Mixing", "Sampling", "Tokenizer", "Other", "Share")
        console.table("Overhead outside ONNX Runtime, ms per token", columns, rows)


def _show_operators(console: Console, graphs: Sequence[Breakdown]) -> None:
    """Print the time per token of each graph, by operator type and by part of the model."""
    columns = ("", *(short(graph.graph, 14) for graph in graphs))
    types = [{operator.type: operator.decode for operator in graph.operators} for graph in graphs]
    totals = {name: sum(each.get(name, 0.0) for each in types) for each in types for name in each}
    shown = sorted(totals, key=lambda name: -totals[name])[:_MAX_OPERATORS]

    def row(name: str, figures: Iterable[float]) -> tuple[str, ...]:
        return short(name, 34), *(_with_share(figure, graph) for figure, graph in zip(figures, graphs, strict=True))

    def others(each: dict[str, float]) -> float:
        return sum(each.values()) - sum(each.get(name, 0.0) for name in shown)

    console.table(
        "Operators, ms per token (%), with the overhead of ONNX Runtime's profiler",
        columns,
        [
            *(row(name, [each.get(name, 0.0) for each in types]) for name in shown),
            row("others", map(others, types)),
            row("between operators", [g.decode - sum(e.values()) for g, e in zip(graphs, types, strict=True)]),
        ],
    )
    parts = [_parts(graph) for graph in graphs]
    names = dict.fromkeys(name for each in parts for name in each)
    console.table(
        "Parts of the model, ms per token (%)",
        columns,
        [row(name, [each.get(name, 0.0) for each in parts]) for name in names],
    )


def _parts(graph: Breakdown) -> dict[str, float]:
    """Return the time of all layers, of the slowest layer, and of the other parts."""
    layers = [layer for layer in graph.layers if layer.name.startswith("layer ")]
    found = {layer.name: layer.decode for layer in graph.layers if layer.name == "embedding"}
    if layers:
        found["all layers"] = sum(layer.decode for layer in layers)
        found["slowest layer"] = max(layer.decode for layer in layers)
    return found | {layer.name: layer.decode for layer in graph.layers if layer.name in ("head", "other")}


def _with_share(seconds: float, graph: Breakdown) -> str:
    share = f" ({100 * seconds / graph.decode:.0f})" if graph.decode > 0 and seconds < 1e6 * graph.decode else ""
    return f"{number(1e3 * seconds)}{share}" if seconds > 0 else ""


def _show_roofline(console: Console, results: Sequence[TargetResult]) -> None:
    rows = [
        (
            short(result.name),
            roof.phase,
            f"{roof.tokens:,}",
            roof.bound,
            number(1e3 * roof.floor),
            number(1e3 * roof.seconds),
            percent(roof.floor / roof.seconds if roof.seconds else math.nan),
        )
        for result in results
        for roof in result.roofline
    ]
    if rows:
        columns = ("", "Phase", "Tokens", "Bound by", "Lower bound, ms", "Measured", "Reached")
        console.table("Roofline", columns, rows, left=2)


def _show_variants(console: Console, profile: Profile) -> None:
    if not profile.variants:
        return
    ordered = sorted(profile.variants, key=lambda variant: variant.tpot.p50)
    console.table(
        "Configurations of the mixture, fastest first, ms",
        ("Threads", "Provider", "Drafts", "Per token", "First token", ""),
        [
            (
                str(variant.threads),
                short(variant.provider),
                {"off": "plain loop"}.get(variant.speculation, short(variant.speculation)),
                _mark_unstable(number(1e3 * variant.tpot.p50), variant.tpot),
                number(1e3 * variant.ttft.p50) if variant.ttft else "",
                "saved plan" if variant.chosen else "",
            )
            for variant in ordered
        ],
        left=3,
    )


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print a comparison: other machines or settings, then each figure with its ratio, this over the other."""
    for line in comparison.differences:
        console.line(f"! {line}")
    if comparison.differences:
        console.line()
    rows = []
    for about, ratios in groupby(comparison.ratios, key=lambda ratio: ratio.about):
        names = chain([short(about)], repeat(""))
        rows += [
            (name, short(ratio.figure, 28), *_both(ratio), number(ratio.ratio) if ratio.ratio else "", ratio.verdict)
            for name, ratio in zip(names, ratios, strict=False)
        ]
    console.table("Ratios, this over the other", ("", "", "This", "Other", "Ratio", ""), rows, left=2)


def _both(ratio: Ratio) -> tuple[str, str]:
    scale, unit = {
        "s": (1e3, " ms"),
        "bytes": (1e-6, " MB"),
        "bytes/s": (1e-9, " GB/s"),
        "1/s": (1.0, "/s"),
        "J": (1.0, " J"),
        "share": (100.0, "%"),
        "times": (1.0, "x"),
    }[ratio.unit]
    if ratio.unit == "1/s" and max(ratio.this, ratio.other) >= 1e6:
        scale, unit = 1e-9, " G/s"
    return f"{number(scale * ratio.this)}{unit}", f"{number(scale * ratio.other)}{unit}"


def _mark_unstable(text: str, figure: Quantiles) -> str:
    """Prefix a measurement that is not stable with ~."""
    return text if figure.stable else f"~{text}"


def number(value: float) -> str:
    """Format a number with about three digits; profiles may hold any number, so very large ones must fit, too."""
    if not math.isfinite(value) or abs(value) >= 1e9:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def percent(share: float) -> str:
    if not math.isfinite(share) or abs(share) >= 100:
        return f"{number(100 * share)}%"
    return f"{100 * share:.0f}%" if abs(share) >= 0.01 or not share else f"{100 * share:.1f}%"


def megabytes(size: int) -> str:
    return number(size / 1e6) if abs(size) < 1 << 80 else "huge"


def short(name: str, length: int = _MAX_NAME_LENGTH) -> str:
    return name if len(name) <= length else f"{name[: length - 3]}..."
