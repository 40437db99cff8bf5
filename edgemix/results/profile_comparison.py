"""Two profiles side by side, ratio by ratio: before and after, or one machine and another.

Both may come from anybody, so any numbers are taken: what has no ratio is left without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemix.results.profile import Loading, Machine, Profile, Quantiles, Subject

Unit = Literal["s", "bytes", "1/s", "bytes/s", "J", "share", "times"]
Verdict = Literal["better", "worse", "same", ""]

MACHINE, LOADING = "the machine", "loading, all"
"""What figures are about that are no subject's; no member can be called so."""
LEAST = 0.02
"""Differences of less are none, however small the spread."""
ROUGHLY = 0.1
"""The spread of what was measured without one."""
LARGER_IS_BETTER: frozenset[Unit] = frozenset({"1/s", "bytes/s", "share", "times"})


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of both profiles.

    Attributes:
        about: What was measured: a subject's name, `LOADING`, `MACHINE`.
        figure: Which figure of it.
        unit: Of both.
        this, other: The figures.
        ratio: This over other; None where there is none.
        verdict: Whether this is better or worse beyond the spread of both; "" where nobody can say.
    """

    about: str
    figure: str
    unit: Unit
    this: float
    other: float
    ratio: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures that both have, and what else is not the same, a line each."""

    ratios: tuple[Ratio, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Figure:
    """One figure of one profile; `spread` as in `Quantiles`."""

    about: str
    name: str
    unit: Unit
    value: float
    spread: float = 0.0


def compare_profiles(this: Profile, other: Profile) -> Comparison:
    """Set a profile against another, by the names of subjects and by sizes."""
    theirs = {(figure.about, figure.name): figure for figure in _figures(other)}
    mine = {(figure.about, figure.name): figure for figure in _figures(this)}
    ratios = tuple(_ratio(figure, theirs[key]) for key, figure in mine.items() if key in theirs)
    return Comparison(ratios, tuple(_differences(this, other)))


def _ratio(this: _Figure, other: _Figure) -> Ratio:
    ratio = this.value / other.value if this.value > 0 and other.value > 0 else math.nan
    verdict: Verdict = ""
    if 0 < ratio < math.inf:
        verdict = _verdict(ratio, max(LEAST, (abs(this.spread) + abs(other.spread)) / 2), this.unit)
    return Ratio(
        this.about, this.name, this.unit, this.value, other.value, ratio if 0 < ratio < math.inf else None, verdict
    )


def _verdict(ratio: float, spread: float, unit: Unit) -> Verdict:
    """Half of each interquartile range is what lies between a median and a quartile."""
    if 1 / (1 + spread) <= ratio <= 1 + spread:
        return "same"
    return "better" if (ratio > 1) == (unit in LARGER_IS_BETTER) else "worse"


def _figures(profile: Profile) -> Iterator[_Figure]:
    yield from _of_machine(profile.machine)
    yield from _of_loading(LOADING, profile.loading)
    for subject in profile.subjects:
        yield from _of_subject(subject)


def _of_machine(machine: Machine) -> Iterator[_Figure]:
    limits = {"memory bandwidth": machine.bandwidth, "fp32 peak": machine.fp32_peak, "int8 peak": machine.int8_peak}
    for name, value in limits.items():
        if value is not None:
            yield _Figure(MACHINE, name, "bytes/s" if name == "memory bandwidth" else "1/s", _number(value), ROUGHLY)


def _of_loading(about: str, loading: Loading) -> Iterator[_Figure]:
    yield _timed(about, "load, warm", loading.warm)
    if loading.cold is not None:
        yield _timed(about, "load, cold", loading.cold)
    for name in ("resident", "peak", "files"):
        yield _Figure(about, name, "bytes", _number(getattr(loading, name)))


def _of_subject(subject: Subject) -> Iterator[_Figure]:
    about = subject.name
    for prefill in subject.prefill:
        yield _timed(about, f"TTFT, {prefill.tokens} tokens", prefill.ttft)
    for decode in subject.decode:
        yield _timed(about, f"TPOT, context {decode.context}", decode.tpot)
    for batch in subject.batches:
        yield _Figure(about, f"rate, {batch.size} texts", "1/s", _number(batch.rate.p50), _number(batch.rate.spread))
    if subject.speculation is not None:
        yield _Figure(about, "speed-up", "times", _number(subject.speculation.speedup), ROUGHLY)
        if subject.speculation.acceptance is not None:
            yield _Figure(about, "acceptance", "share", _number(subject.speculation.acceptance), ROUGHLY)
    if subject.outside is not None:
        outside = subject.outside
        parts = (outside.tokenizer, outside.mixing, outside.sampling, outside.other)
        yield _Figure(about, "outside ONNX Runtime", "s", _number(sum(map(_number, parts))), ROUGHLY)
    if subject.energy is not None:
        yield _Figure(about, f"energy, {subject.energy.counter}", "J", _number(subject.energy.joules), ROUGHLY)
    if subject.loading is not None:
        yield from _of_loading(about, subject.loading)


def _timed(about: str, name: str, found: Quantiles) -> _Figure:
    return _Figure(about, name, "s", _number(found.p50), _number(found.spread))


def _number(value: float) -> float:
    """A number as a float; what no float can hold, or is none, becomes 0, of which there is no ratio."""
    try:
        number = float(value)
    except OverflowError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def _differences(this: Profile, other: Profile) -> Iterator[str]:
    if this.digest != other.digest:
        yield f"another bundle, or made anew: {this.bundle} and {other.bundle}"
    if this.weights != other.weights:
        yield f"other weights: {this.weights or 'its own'} and {other.weights or 'its own'}"
    for name in ("processor", "cores", "platform", "provider", "threads", "onnxruntime", "edgemix"):
        mine, theirs = getattr(this.machine, name), getattr(other.machine, name)
        if mine != theirs:
            yield f"another {name}: {mine} and {theirs}"
    if this.quick != other.quick:
        yield "one of them was measured in a hurry (--quick)"
