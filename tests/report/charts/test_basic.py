"""Axes of the basic charts."""

from __future__ import annotations

import pytest

from edgemix.report.charts.basic import log_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.03, 0.4, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (0.01, 3.0, [0.01, 0.1, 1.0, 10.0]),
        (5.0, 5.0, [5.0, 10.0]),
        (1.0, 1.0, [1.0, 2.0]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)
