"""Charts as SVG elements of a page."""

from __future__ import annotations

import altair as alt
from helpers.html_page import HtmlPage

from edgemix.report.blocks import Table
from edgemix.report.charts.drawing import figure, inline_data


def clipped(canvas):
    data = inline_data([{"x": 1, "y": 1}, {"x": 2, "y": 2}])
    return alt.Chart(data, width=canvas.width, height=50).mark_line(clip=True).encode(x="x:Q", y="y:Q")


def test_ids_are_unique_and_references_follow_them():
    page = HtmlPage.parse(figure("a", Table("A title", (), ()), clipped).drawing)

    clips = {element.attributes["id"] for element in page.all("clippath")}
    assert len(clips) == 2
    used = {element.attributes["clip-path"] for element in page.elements if "clip-path" in element.attributes}
    assert used == {f"url(#{clip})" for clip in clips}


def test_clip_paths_keep_their_size():
    """Regression: without the width and height of its rectangle, a clip path hides the lines of the roofline."""
    page = HtmlPage.parse(figure("a", Table("A title", (), ()), clipped).drawing)

    assert all(float(rect.attributes["width"]) > 0 < float(rect.attributes["height"]) for rect in page.all("rect"))
    assert page.all("rect")
    assert not any({"width", "height"} & set(svg.attributes) for svg in page.all("svg"))
