"""The ratios of two profiles' figures: before and after a change, or of two machines.

A profile's file may hold any numbers; a figure that has no finite ratio gets none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemix.results.profile import Loading, Machine, Profile, Quantiles, TargetResult

Unit = Literal["s", "bytes", "1/s", "bytes/s", "J", "share", "times"]
Verdict = Literal["better", "worse", "same", ""]

MACHINE, LOADING = "the machine", "loading, all"
"""What a figure is about if it is not a target's; no member can have these names."""
LEAST = 0.02
"""Relative differences below this are "same", however small the spread."""
ROUGHLY = 0.1
"""The assumed spread of figures without a measured one."""
LARGER_IS_BETTER: frozenset[Unit] = frozenset({"1/s", "bytes/s", "share", "times"})


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of both profiles.

    Attributes:
        about: A target's name, `LOADING` or `MACHINE`.
        figure: The figure's name.
        unit: The unit of both values.
        this, other: The values.
        ratio: This divided by other; None if it is not a finite number above zero.
        verdict: "better", "worse" or "same" within the spread of both; "" without a ratio.
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
    """The ratios of all figures that both profiles have, and their differing settings, a line each."""

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
    """Compare two profiles, figure by figure, by the names of targets and by sizes."""
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
    """Compare a ratio with the spread: half of each interquartile range lies between a median and a quartile."""
    if 1 / (1 + spread) <= ratio <= 1 + spread:
        return "same"
    return "better" if (ratio > 1) == (unit in LARGER_IS_BETTER) else "worse"


def _figures(profile: Profile) -> Iterator[_Figure]:
    yield from _of_machine(profile.machine)
    yield from _of_loading(LOADING, profile.loading)
    for result in profile.results:
        yield from _of_result(result)


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


def _of_result(result: TargetResult) -> Iterator[_Figure]:
    about = result.name
    for prefill in result.prefill:
        yield _timed(about, f"TTFT, {prefill.tokens} tokens", prefill.ttft)
    for decode in result.decode:
        yield _timed(about, f"TPOT, context {decode.context}", decode.tpot)
    for batch in result.batches:
        yield _Figure(about, f"rate, {batch.size} texts", "1/s", _number(batch.rate.p50), _number(batch.rate.spread))
    if result.speculation is not None:
        yield _Figure(about, "speed-up", "times", _number(result.speculation.speedup), ROUGHLY)
        if result.speculation.acceptance is not None:
            yield _Figure(about, "acceptance", "share", _number(result.speculation.acceptance), ROUGHLY)
    if result.overhead is not None:
        overhead = result.overhead
        parts = (overhead.tokenizer, overhead.mixing, overhead.sampling, overhead.other)
        yield _Figure(about, "outside ONNX Runtime", "s", _number(sum(map(_number, parts))), ROUGHLY)
    if result.energy is not None:
        yield _Figure(about, f"energy, {result.energy.counter}", "J", _number(result.energy.joules), ROUGHLY)
    if result.loading is not None:
        yield from _of_loading(about, result.loading)


def _timed(about: str, name: str, found: Quantiles) -> _Figure:
    return _Figure(about, name, "s", _number(found.p50), _number(found.spread))


def _number(value: float) -> float:
    """Convert a number to float; numbers that are not finite become 0, which has no ratio."""
    try:
        number = float(value)
    except OverflowError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def _differences(this: Profile, other: Profile) -> Iterator[str]:
    if this.digest != other.digest:
        yield f"another bundle, or exported anew: {this.bundle} and {other.bundle}"
    if this.weights != other.weights:
        yield f"other weights: {this.weights or 'its own'} and {other.weights or 'its own'}"
    for name in ("processor", "cores", "platform", "provider", "threads", "onnxruntime", "edgemix"):
        mine, theirs = getattr(this.machine, name), getattr(other.machine, name)
        if mine != theirs:
            yield f"another {name}: {mine} and {theirs}"
    if this.quick != other.quick:
        yield "one of them was measured with --quick"
