"""Figures are what their samples say, and rounds go on until they agree or the time is over."""

from __future__ import annotations

import pytest

from edgemix.runtime.profiling import timing
from edgemix.runtime.profiling.timing import MOST_ROUNDS, ROUNDS, Measurement, Series, quantiles, take_turns


class Clock:
    """A clock that only work moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def measurement(self, name, figures, seconds=1.0):
        """Takes so long a turn, and gives the next of some figures, the last one for ever."""
        left = list(figures)

        def take(number):
            self.now += seconds
            return {"x": [left[min(number, len(left) - 1)]] * 4}

        return Measurement(name, take)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_quantiles_by_hand():
    found = quantiles([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])

    assert (found.p50, found.p90, found.p99, found.count) == (6, 10, 11, 11)
    assert found.spread == pytest.approx((8.5 - 3.5) / 6)


def test_with_few_samples_high_quantiles_are_the_largest():
    found = quantiles([3.0, 1.0, 2.0])

    assert (found.p50, found.p90, found.p99) == (2, 3, 3)


def test_no_samples_are_no_figure():
    with pytest.raises(ValueError, match="nothing was measured"):
        quantiles([])
    assert Measurement("m", lambda _: {}).figure("x") is None


def test_the_first_round_is_a_warm_up_once_there_are_others():
    series = Series()
    for value in (9.0, 1.0, 1.0):
        series.add([value])
    assert max(series.samples) == 9

    series.add([1.0])
    assert series.samples == [1, 1, 1]


@pytest.mark.parametrize(
    ("rounds", "stable"),
    [([1.0, 1.0], False), ([1.0, 1.01, 0.99], True), ([1.0, 1.0, 2.0], False), ([5.0, 1.0, 1.01, 1.0], True)],
)
def test_rounds_must_agree(rounds, stable):
    assert Series([[value] for value in rounds]).stable is stable


def test_what_is_steady_has_its_rounds_and_no_more(clock):
    calm, wild = clock.measurement("calm", [1.0]), clock.measurement("wild", [1.0, 9.0, 1.0, 5.0, 1.0, 9.0])

    take_turns([calm, wild], until=1e6)

    assert calm.turns == ROUNDS
    assert ROUNDS < wild.turns <= MOST_ROUNDS


def test_what_never_holds_still_says_so(clock):
    wild = clock.measurement("wild", [float(2 ** (n % 5)) for n in range(MOST_ROUNDS)])

    take_turns([wild], until=1e6)

    assert wild.turns == MOST_ROUNDS
    assert wild.figure("x").stable is False


def test_the_deadline_ends_it_and_the_first_ones_were_measured(clock):
    measurements = [clock.measurement(name, [1.0], seconds=4) for name in "abc"]

    take_turns(measurements, until=clock.now + 10)

    assert [each.turns for each in measurements] == [1, 1, 1]
    assert clock.now <= 100 + 12  # the third began before the end


def test_a_turn_that_would_not_fit_is_not_begun(clock):
    long, short = clock.measurement("long", [1.0], seconds=6), clock.measurement("short", [1.0], seconds=1)

    take_turns([long, short], until=clock.now + 10)

    assert (long.turns, short.turns) == (1, 3)
    assert clock.now <= 110


def test_the_first_one_is_measured_however_late_it_is(clock):
    first, second = clock.measurement("first", [1.0]), clock.measurement("second", [1.0])

    take_turns([first, second], until=clock.now - 5)

    assert (first.turns, second.turns) == (1, 0)
