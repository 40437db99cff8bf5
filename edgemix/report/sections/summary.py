"""The answer first: a sentence and a few large figures, as far as they are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.report import formatting
from edgemix.report.blocks import Tile
from edgemix.report.data import best_member, own_row

if TYPE_CHECKING:
    from edgemix.report.data import Material
    from edgemix.results.evaluation import Evaluation
    from edgemix.results.profile import Subject


def answer(material: Material) -> str:
    """What there is to say in a sentence or two."""
    parts = [_contents(material) if material.evaluation is None else _quality(material.evaluation)]
    if (rate := _rate(material)) is not None:
        where = "on the machine that made this report"
        if material.profile is not None:
            threads = material.profile.machine.threads
            where = f"with {threads} threads" if threads > 1 else "with one thread"
        parts.append(f"It writes {formatting.digits(rate)} tokens a second {where}.")
    return " ".join(parts)


def tiles(material: Material) -> list[Tile]:
    """The large figures."""
    found = []
    if (evaluation := material.evaluation) is not None:
        found.append(_bits(evaluation))
    found += _speeds(material)
    student = material.manifest.student
    beside = f"{len(material.members)} in {formatting.listed(list(material.formats))}"
    if student is not None:
        beside += f"; the student {formatting.size(material.size_of([student]))}"
    value, _, unit = formatting.size(material.size_of(material.manifest.members)).partition(" ")
    found.append(Tile(value, unit, "members" if len(material.members) > 1 else "member", beside))
    if (tile := _acceptance(material)) is not None:
        found.append(tile)
    return found


def _contents(material: Material) -> str:
    manifest = material.manifest
    members, formats = len(manifest.members), formatting.listed(list(material.formats))
    what = f"A mixture of {members} members" if members > 1 else "One member"
    student = "" if manifest.student is None else f" and a student in {manifest.student.format}"
    return f"{what} in {formats}{student}: {formatting.size(material.size)} for {manifest.target}."


def _quality(evaluation: Evaluation) -> str:
    own, best = own_row(evaluation), best_member(evaluation)
    bits, others = own.overall.bits_per_byte, best.overall.bits_per_byte
    if own is best or others <= 0:
        return f"{formatting.name(own.name)} needs {bits:.3f} bits per byte of these texts."
    change = bits / others - 1
    than = f"{abs(change):.1%} {'fewer' if change < 0 else 'more'} than its best member, {formatting.name(best.name)}"
    if abs(change) < 0.0005:
        than = f"as many as its best member, {formatting.name(best.name)}"
    return f"The mixture needs {bits:.3f} bits per byte of these texts, {than}."


def _bits(evaluation: Evaluation) -> Tile:
    own, best = own_row(evaluation), best_member(evaluation)
    beside = [] if own is best else [f"best member {best.overall.bits_per_byte:.3f}"]
    adaptive = next((row for row in evaluation.rows if row.name == "adaptive" and row.kind == "mixture"), None)
    if adaptive is not None:
        beside.append(f"adaptive weights {adaptive.overall.bits_per_byte:.3f}")
    return Tile(f"{own.overall.bits_per_byte:.3f}", "", "bits per byte", ", ".join(beside))


def usual_mixture(material: Material) -> Subject | None:
    """The mixture as it is meant to run, in a profile; of a bundle of one, the member."""
    if material.profile is None:
        return None
    timed = [subject for subject in material.profile.subjects if subject.rate is not None]
    mixtures = [subject for subject in timed if subject.kind == "mixture"]
    alone = [subject for subject in timed if subject.kind == "member"] if len(material.members) == 1 else []
    return max(mixtures or alone, key=lambda subject: subject.speculation is not None, default=None)


def _rate(material: Material) -> float | None:
    """Tokens a second of the mixture."""
    subject = usual_mixture(material)
    if subject is not None:
        return subject.rate
    return None if material.evaluation is None else own_row(material.evaluation).decode_rate


def _speeds(material: Material) -> list[Tile]:
    rate, subject, found = _rate(material), usual_mixture(material), list[Tile]()
    if rate is not None:
        beside = "decoding, one text"
        if subject is not None and subject.speculation is not None:
            beside = f"{subject.speculation.speedup:.2f} times the plain mixture"
        if subject is not None and not subject.decode[0].tpot.steady:
            beside += ", not steady"
        found.append(Tile(formatting.digits(rate), "", "tokens a second", beside))
    if subject is not None and subject.prefill:
        shortest = subject.prefill[0]
        value, _, unit = formatting.seconds(shortest.ttft.p50).partition(" ")
        found.append(Tile(value, unit, "to the first token", f"of a prompt of {shortest.tokens:,}"))
    return found


def _acceptance(material: Material) -> Tile | None:
    subject = usual_mixture(material)
    if subject is not None and subject.speculation is not None and subject.speculation.acceptance is not None:
        return Tile(formatting.share(subject.speculation.acceptance), "", "of drafts accepted", "as measured")
    if material.evaluation is None:
        return None
    student = next((row for row in material.evaluation.rows if row.kind == "student"), None)
    if student is None or student.overall.acceptance is None:
        return None
    return Tile(
        formatting.share(student.overall.acceptance),
        "",
        "of the student's drafts accepted",
        "as expected on these texts",
    )
