"""The colored text of a weight trace."""

from __future__ import annotations

from helpers.samples import manifest

from edgemix.report.data import ReportData
from edgemix.report.sections.weight_traces import LEVELS, level, weight_traces_section
from edgemix.results.evaluation import WeightTrace


def test_levels_grow_with_the_largest_weight():
    assert level(1 / 3, 3) == 0
    assert level(1.0, 3) == LEVELS
    assert level(0.5, 2) < level(0.8, 2) <= LEVELS


def test_consecutive_tokens_with_one_leading_member_are_one_span():
    weights = {"math": (0.9, 0.9, 0.1, 0.5), "code": (0.1, 0.1, 0.9, 0.5)}
    data = ReportData("two", manifest(("math", "code")), traces=(WeightTrace("x", ("a", "b", "c", "d"), weights),))

    text = next(block for block in weight_traces_section(data).blocks if block.kind == "text")

    assert [(span.text, span.member, span.level) for span in text.spans] == [
        ("ab", "math", 3),
        ("c", "code", 3),
        ("d", "math", 0),
    ]
