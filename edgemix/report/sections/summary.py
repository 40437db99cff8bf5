"""The summary at the top of the page: a sentence or two, and a few headline numbers (KPIs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.report import formatting
from edgemix.report.blocks import Kpi
from edgemix.report.data import best_member, mixture_row

if TYPE_CHECKING:
    from edgemix.report.data import ReportData
    from edgemix.results.evaluation import Evaluation
    from edgemix.results.profile import TargetResult


def summary(data: ReportData) -> str:
    """Return the summary's sentences."""
    parts = [_contents(data) if data.evaluation is None else _quality(data.evaluation)]
    if (rate := _rate(data)) is not None:
        where = "on the machine that made this report"
        if data.profile is not None:
            threads = data.profile.machine.threads
            where = f"with {threads} threads" if threads > 1 else "with one thread"
        parts.append(f"It generates {formatting.digits(rate)} tokens per second {where}.")
    return " ".join(parts)


def kpis(data: ReportData) -> list[Kpi]:
    """Return the headline numbers that the data allows."""
    found = []
    if (evaluation := data.evaluation) is not None:
        found.append(_bits(evaluation))
    found += _speeds(data)
    student = data.manifest.student
    note = f"{len(data.members)} in {formatting.join(list(data.formats))}"
    if student is not None:
        note += f"; the student {formatting.size(data.size_of([student]))}"
    value, _, unit = formatting.size(data.size_of(data.manifest.members)).partition(" ")
    found.append(Kpi(value, unit, "members" if len(data.members) > 1 else "member", note))
    if (kpi := _acceptance(data)) is not None:
        found.append(kpi)
    return found


def _contents(data: ReportData) -> str:
    manifest = data.manifest
    members, formats = len(manifest.members), formatting.join(list(data.formats))
    what = f"A mixture of {members} members" if members > 1 else "One member"
    student = "" if manifest.student is None else f" and a student in {manifest.student.format}"
    return f"{what} in {formats}{student}: {formatting.size(data.size)} for {manifest.target}."


def _quality(evaluation: Evaluation) -> str:
    own, best = mixture_row(evaluation), best_member(evaluation)
    bits, others = own.overall.bits_per_byte, best.overall.bits_per_byte
    if own is best or others <= 0:
        return f"{formatting.name(own.name)} needs {bits:.3f} bits per byte on these texts."
    change = bits / others - 1
    than = f"{abs(change):.1%} {'fewer' if change < 0 else 'more'} than its best member, {formatting.name(best.name)}"
    if abs(change) < 0.0005:
        than = f"as many as its best member, {formatting.name(best.name)}"
    return f"The mixture needs {bits:.3f} bits per byte on these texts, {than}."


def _bits(evaluation: Evaluation) -> Kpi:
    own, best = mixture_row(evaluation), best_member(evaluation)
    note = [] if own is best else [f"best member {best.overall.bits_per_byte:.3f}"]
    adaptive = next((row for row in evaluation.rows if row.name == "adaptive" and row.kind == "mixture"), None)
    if adaptive is not None:
        note.append(f"adaptive weights {adaptive.overall.bits_per_byte:.3f}")
    return Kpi(f"{own.overall.bits_per_byte:.3f}", "", "bits per byte", ", ".join(note))


def default_mixture(data: ReportData) -> TargetResult | None:
    """Return the profiled mixture, with speculative decoding if that was measured; the member of a bundle of one."""
    if data.profile is None:
        return None
    timed = [result for result in data.profile.results if result.rate is not None]
    mixtures = [result for result in timed if result.kind == "mixture"]
    alone = [result for result in timed if result.kind == "member"] if len(data.members) == 1 else []
    return max(mixtures or alone, key=lambda result: result.speculation is not None, default=None)


def _rate(data: ReportData) -> float | None:
    """Return the mixture's tokens per second."""
    result = default_mixture(data)
    if result is not None:
        return result.rate
    if data.evaluation is None:
        return None
    generated = (row.generation_rate for row in data.evaluation.rows if row.generation_rate is not None)
    return next(generated, mixture_row(data.evaluation).decode_rate)


def _speeds(data: ReportData) -> list[Kpi]:
    rate, result, found = _rate(data), default_mixture(data), list[Kpi]()
    if rate is not None:
        note = "decoding, one text"
        if result is not None and result.speculation is not None:
            note = f"{result.speculation.speedup:.2f} times the plain loop"
        if result is not None and not result.decode[0].tpot.stable:
            note += ", not stable"
        found.append(Kpi(formatting.digits(rate), "", "tokens per second", note))
    if result is not None and result.prefill:
        shortest = result.prefill[0]
        value, _, unit = formatting.seconds(shortest.ttft.p50).partition(" ")
        found.append(Kpi(value, unit, "to the first token", f"prompt of {shortest.tokens:,} tokens"))
    return found


def _acceptance(data: ReportData) -> Kpi | None:
    result = default_mixture(data)
    if result is not None and result.speculation is not None and result.speculation.acceptance is not None:
        return Kpi(formatting.share(result.speculation.acceptance), "", "of draft tokens accepted", "measured")
    if data.evaluation is None:
        return None
    student = next((row for row in data.evaluation.rows if row.kind == "student"), None)
    if student is None or student.overall.acceptance is None:
        return None
    return Kpi(
        formatting.share(student.overall.acceptance),
        "",
        "of the student's draft tokens accepted",
        "expected on these texts",
    )
