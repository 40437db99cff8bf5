"""Interleaved measuring: each measurement has a turn per round, unstable ones have more, until a deadline."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgemix.progress import NO_PROGRESS
from edgemix.results.profile import Quantiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from edgemix.progress import Progress, ProgressTask

ROUNDS = 3
"""Rounds that a figure needs before it can be stable."""
MAX_ROUNDS = 12
AGREEMENT = 0.1
"""Interquartile range of the medians of a stable figure's rounds, over the median of all, at most."""


@dataclass
class Series:
    """One figure's samples, round by round.

    The first round is a warm-up, and does not count once there are enough others.
    """

    rounds: list[list[float]] = field(default_factory=list)

    def add(self, samples: Iterable[float]) -> None:
        """Add the samples of one more round; a round without any does not count."""
        if found := list(samples):
            self.rounds.append(found)

    @property
    def samples(self) -> list[float]:
        """The samples that count."""
        return [sample for each in self._counting for sample in each]

    @property
    def stable(self) -> bool:
        """Whether there are enough rounds, and they agree."""
        medians = [float(np.median(each)) for each in self._counting]
        if len(medians) < ROUNDS:
            return False
        low, high = np.percentile(medians, [25, 75])
        return bool(high - low <= AGREEMENT * abs(np.median(self.samples)))

    def quantiles(self) -> Quantiles:
        """Return the quantiles of the samples.

        Raises:
            ValueError: Nothing was measured.
        """
        return quantiles(self.samples, stable=self.stable)

    @property
    def _counting(self) -> list[list[float]]:
        return self.rounds[1:] if len(self.rounds) > ROUNDS else self.rounds


def quantiles(samples: Sequence[float], *, stable: bool = True) -> Quantiles:
    """Median, higher quantiles (each a sample: the next one above), and interquartile range over the median.

    Raises:
        ValueError: There are no samples.
    """
    if not len(samples):
        raise ValueError("nothing was measured")
    low, middle, high = (float(q) for q in np.percentile(samples, [25, 50, 75]))
    p90, p99 = (float(q) for q in np.percentile(samples, [90, 99], method="higher"))
    spread = (high - low) / middle if middle else 0.0
    return Quantiles(middle, p90, p99, spread, len(samples), stable)


@dataclass
class Measurement:
    """A repeatable measurement.

    Attributes:
        name: Name for display.
        take: Number of the round -> samples of each of its figures.
        series: The series of each figure.
        seconds: Duration of the last turn.
    """

    name: str
    take: Callable[[int], Mapping[str, Sequence[float]]]
    series: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    turns: int = 0
    seconds: float = 0.0

    @property
    def stable(self) -> bool:
        """Whether all of its figures are stable."""
        return bool(self.series) and all(each.stable for each in self.series.values())

    def turn(self) -> None:
        """Measure it once more."""
        begun = time.perf_counter()
        for name, samples in self.take(self.turns).items():
            self.series[name].add(samples)
        self.turns += 1
        self.seconds = time.perf_counter() - begun

    def figure(self, name: str) -> Quantiles | None:
        """Return a figure's quantiles by its name; None where it was never measured."""
        return self.series[name].quantiles() if name in self.series and self.series[name].rounds else None


def take_turns(
    measurements: Sequence[Measurement],
    *,
    until: float,
    rounds: int = MAX_ROUNDS,
    title: str = "measuring",
    progress: Progress = NO_PROGRESS,
) -> None:
    """Interleave measurements, so that a machine that slows down does so for all.

    Each has `ROUNDS` turns, the first ones first if time is short; those that are not stable then have more. The first
    measurement has at least one turn.

    Args:
        measurements: The most important first.
        until: `time.perf_counter()` at which it ends; a turn that is not likely to end by then is not begun.
        rounds: Maximum turns of one measurement.
        title: Title of the progress stage.
        progress: Progress callback; counts seconds.
    """
    with progress.stage(title, max(0.0, until - time.perf_counter())) as task:
        for number in range(rounds):
            due = [each for each in measurements if each.turns <= number and not (number >= ROUNDS and each.stable)]
            taken = [_turn(each, math.inf if each is measurements[0] and not number else until, task) for each in due]
            if not any(taken):
                break


def _turn(measurement: Measurement, until: float, task: ProgressTask) -> bool:
    """Take a turn, if there is time for it."""
    begun = time.perf_counter()
    if begun + measurement.seconds > until:
        return False
    measurement.turn()
    task.advance(time.perf_counter() - begun, note=measurement.name)
    return True
