"""The Pareto front and the labels of points."""

from __future__ import annotations

import itertools

from edgemix.report.charts.basic import CHARACTER_WIDTH
from edgemix.report.charts.scatter import LINE, Point, labels, pareto_front


def test_the_pareto_front_holds_the_undominated_points():
    points = [
        Point(name, "text", x, y) for name, x, y in [("a", 1, 3), ("b", 2, 2), ("c", 2, 4), ("d", 3, 2), ("e", 4, 1)]
    ]

    assert [point.name for point in pareto_front(points, lower_x=True)] == ["a", "b", "e"]
    assert [point.name for point in pareto_front(points, lower_x=False)] == ["e"]


def test_a_label_does_not_hide_another_point():
    """The left point's label would cover the right point."""
    left, right = labels(["mixture, plain", "mixture"], [(20.0, 50.0), (60.0, 50.0)], 300.0)

    assert left.at - 50 >= LINE
    assert right.at - 50 < LINE or right.at - left.at >= LINE


def test_labels_do_not_overlap():
    names = ["one", "a longer one", "two", "three", "at the edge"]
    places = [(10.0, 50.0), (12.0, 51.0), (40.0, 52.0), (10.0, 60.0), (295.0, 50.0)]

    placed = labels(names, places, 300.0)

    assert [label.side for label in placed] == ["right", "right", "right", "right", "left"]
    boxes = []
    for name, (x, _), label in zip(names, places, placed, strict=True):
        length = len(name) * CHARACTER_WIDTH
        left = x if label.side == "right" else x - length
        boxes.append((left, left + length, label.at))
    for one, other in itertools.combinations(boxes, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= LINE
