"""The heat map's colors and the rows with a decode rate."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from helpers.samples import evaluation, manifest, profile

from edgemix.report.data import ReportData
from edgemix.report.sections.quality import decode_rates, heat_color


def test_heat_is_relative_to_the_columns_minimum():
    assert [heat_color(value, 1.0) for value in (1.0, 1.02, 1.07, 1.15, 1.3, 2.0)] == [
        "h0",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
    ]
    assert heat_color(float("inf"), 1.0) == "h5"
    assert heat_color(0.0, 0.0) == "h0"


def test_both_rates_of_the_mixture_are_named():
    rows = evaluation().rows
    rows = tuple(replace(row, generation_rate=99.0) if row.name == "fitted" else row for row in rows)
    measured = replace(evaluation(), rows=rows)
    data = ReportData("experts", manifest(), measured, (), None)

    rates = {name: rate for row, name, rate in decode_rates(data, measured) if row.name == "fitted"}
    assert list(rates) == ["mixture, fitted weights, plain loop", "mixture, fitted weights"]
    assert rates["mixture, fitted weights"] == 99.0


@pytest.mark.parametrize(("weights", "rows"), [("", {"fitted"}), ("adaptive", {"adaptive"}), ("a=1,b=2", set())])
def test_a_profile_with_given_weights_uses_the_row_of_those_weights(weights, rows):
    data = ReportData("experts", manifest(), evaluation(), (), msgspec.structs.replace(profile(), weights=weights))

    assert {row.name for row, _, _ in decode_rates(data, evaluation()) if row.kind == "mixture"} == rows
