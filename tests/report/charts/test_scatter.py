"""The Pareto front and the marks of points."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.html_page import HtmlPage

from edgemix.report.blocks import Table
from edgemix.report.charts.drawing import figure
from edgemix.report.charts.palette import light
from edgemix.report.charts.scatter import Point, pareto_chart, pareto_front


def test_the_pareto_front_holds_the_undominated_points():
    points = [
        Point(name, "text", x, y) for name, x, y in [("a", 1, 3), ("b", 2, 2), ("c", 2, 4), ("d", 3, 2), ("e", 4, 1)]
    ]

    assert [point.name for point in pareto_front(points, lower_x=True)] == ["a", "b", "e"]
    assert [point.name for point in pareto_front(points, lower_x=False)] == ["e"]


def marks(*points):
    """Return fill, outline and place of every mark of a Pareto chart at both widths."""
    chart = partial(pareto_chart, points=points, x="x", y="y", lower_x=True)
    page = HtmlPage.parse(figure("a", Table("A title", (), ()), chart).drawing)
    colors = {light(point.color) for point in points}
    found = [path.attributes for path in page.all("path") if path.attributes.get("fill") in colors]
    return [(path["fill"], path["d"], path["transform"]) for path in found]


def test_each_point_has_its_color_and_shape():
    found = marks(Point("one", "m0", 1, 3), Point("two", "text", 2, 2, "square"), Point("three", "m1", 3, 1))

    assert [fill for fill, _, _ in found] == [light("m0"), light("text"), light("m1")] * 2
    one, two, three = (outline for _, outline, _ in found[:3])
    assert one == three != two


@pytest.mark.parametrize("y", [0.0, 2.5])
def test_points_of_one_height(y):
    found = marks(Point("one", "m0", 1, y), Point("two", "text", 2, y))

    assert len(found) == 4
    assert not any("NaN" in place for _, _, place in found)
