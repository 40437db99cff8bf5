"""The Pareto front and the marks of points."""

from __future__ import annotations

from edgemix.report.charts.drawing import WIDE
from edgemix.report.charts.palette import light
from edgemix.report.charts.scatter import Point, pareto_chart, pareto_front


def test_the_pareto_front_holds_the_undominated_points():
    points = [
        Point(name, "text", x, y) for name, x, y in [("a", 1, 3), ("b", 2, 2), ("c", 2, 4), ("d", 3, 2), ("e", 4, 1)]
    ]

    assert [point.name for point in pareto_front(points, lower_x=True)] == ["a", "b", "e"]
    assert [point.name for point in pareto_front(points, lower_x=False)] == ["e"]


def test_each_point_of_a_pareto_chart_has_its_color_and_shape():
    points = [Point("one", "m0", 1, 3), Point("two", "text", 2, 2, "square")]

    names = ["one", "two"]
    marks = pareto_chart(WIDE, points, x="x", y="y", lower_x=True).to_dict(validate=False)["layer"][1]["encoding"]

    assert marks["color"]["scale"] == {"domain": names, "range": [light("m0"), light("text")]}
    assert marks["shape"]["scale"] == {"domain": names, "range": ["circle", "square"]}
