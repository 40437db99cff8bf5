"""Quantiles of samples, and rounds until they agree or time is over."""

from __future__ import annotations

import pytest

from edgemix.runtime.profiling import timing
from edgemix.runtime.profiling.timing import MAX_ROUNDS, ROUNDS, Measurement, Series, quantiles, take_turns


class Clock:
    """A clock that only measurements advance."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def measurement(self, name, figures, seconds=1.0):
        """Return a measurement that takes `seconds` per turn and yields the given figures, the last one repeatedly."""
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


def test_no_samples_give_no_quantiles():
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


def test_a_stable_measurement_has_no_extra_rounds(clock):
    calm, wild = clock.measurement("calm", [1.0]), clock.measurement("wild", [1.0, 9.0, 1.0, 5.0, 1.0, 9.0])

    take_turns([calm, wild], until=1e6)

    assert calm.turns == ROUNDS
    assert ROUNDS < wild.turns <= MAX_ROUNDS


def test_an_unstable_measurement_is_marked(clock):
    wild = clock.measurement("wild", [float(2 ** (n % 5)) for n in range(MAX_ROUNDS)])

    take_turns([wild], until=1e6)

    assert wild.turns == MAX_ROUNDS
    assert wild.figure("x").stable is False


def test_the_deadline_ends_measuring_after_the_first_ones(clock):
    measurements = [clock.measurement(name, [1.0], seconds=4) for name in "abc"]

    take_turns(measurements, until=clock.now + 10)

    assert [each.turns for each in measurements] == [1, 1, 1]
    assert clock.now <= 100 + 12  # the third began before the end


def test_a_turn_without_time_is_not_started(clock):
    long, short = clock.measurement("long", [1.0], seconds=6), clock.measurement("short", [1.0], seconds=1)

    take_turns([long, short], until=clock.now + 10)

    assert (long.turns, short.turns) == (1, 3)
    assert clock.now <= 110


def test_the_first_measurement_always_has_a_turn(clock):
    first, second = clock.measurement("first", [1.0]), clock.measurement("second", [1.0])

    take_turns([first, second], until=clock.now - 5)

    assert (first.turns, second.turns) == (1, 0)
