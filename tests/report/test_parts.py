"""The report's parts: figures in words, places of labels, who leads where, colours."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import pytest
from helpers.samples import evaluation, manifest, passages, profile

from edgemix.report import formatting
from edgemix.report.charts.palette import MEMBER_TONES, TONES, member_tones
from edgemix.report.charts.scatter import LINE, Point, front, labels
from edgemix.report.charts.shapes import CHARACTER, decades
from edgemix.report.data import Material
from edgemix.report.sections.quality import _rates, heat_tone
from edgemix.report.sections.summary import answer, tiles
from edgemix.report.sections.text import LEVELS, level, text_section
from edgemix.results.evaluation import Passage


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (formatting.seconds(1.5), "1.50 s"),
        (formatting.seconds(0.0149), "14.9 ms"),
        (formatting.seconds(0.00002), "20.0 µs"),
        (formatting.size(418_000_000), "418 MB"),
        (formatting.size(1_234_567), "1.2 MB"),
        (formatting.size(900), "900 B"),
        (formatting.count(134_515_008), "134.5 M"),
        (formatting.digits(9.996), "10.0"),
        (formatting.digits(99.96), "100"),
        (formatting.name("a\n b"), "a b"),
        (formatting.name("x" * 70), "x" * 63 + "…"),
        (formatting.listed(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_words(said, shown):
    assert said == shown


def test_the_front_is_what_nothing_beats():
    points = [
        Point(name, "ink", x, y) for name, x, y in [("a", 1, 3), ("b", 2, 2), ("c", 2, 4), ("d", 3, 2), ("e", 4, 1)]
    ]

    assert [point.name for point in front(points, less=True)] == ["a", "b", "e"]
    assert [point.name for point in front(points, less=False)] == ["e"]


def test_a_label_does_not_hide_another_point():
    """The label of the left one would lie on the right one."""
    left, right = labels(["mixture, plain", "mixture"], [(20.0, 50.0), (60.0, 50.0)], 300.0)

    assert left.at - 50 >= LINE
    assert right.at - 50 < LINE or right.at - left.at >= LINE


def test_labels_do_not_lie_on_each_other():
    names = ["one", "a longer one", "two", "three", "at the edge"]
    places = [(10.0, 50.0), (12.0, 51.0), (40.0, 52.0), (10.0, 60.0), (295.0, 50.0)]

    placed = labels(names, places, 300.0)

    assert [label.side for label in placed] == ["right", "right", "right", "right", "left"]
    boxes = []
    for name, (x, _), label in zip(names, places, placed, strict=True):
        length = len(name) * CHARACTER
        left = x if label.side == "right" else x - length
        boxes.append((left, left + length, label.at))
    for one, other in itertools.combinations(boxes, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= LINE


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.03, 0.4, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (0.01, 3.0, [0.01, 0.1, 1.0, 10.0]),
        (5.0, 5.0, [5.0, 10.0]),
        (1.0, 1.0, [1.0, 2.0]),
    ],
)
def test_logarithmic_ticks(low, high, ticks):
    assert decades(low, high) == pytest.approx(ticks)


def test_heat_goes_by_the_column():
    assert [heat_tone(value, 1.0) for value in (1.0, 1.02, 1.07, 1.15, 1.3, 2.0)] == [
        "h0",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
    ]
    assert heat_tone(float("inf"), 1.0) == "h5"
    assert heat_tone(0.0, 0.0) == "h0"


def test_the_answer_says_what_is_known():
    everything = Material("experts", manifest(), evaluation(), passages(), profile())
    assert answer(everything).startswith(
        "The mixture needs 0.847 bits per byte of these texts, 5.2% fewer than its best"
    )
    assert [tile.value for tile in tiles(everything)] == ["0.847", "66.9", "17.9", "418", "61%"]

    unread = Material("experts", manifest(), profile=profile())
    assert answer(unread).endswith("473 MB for cpu. It writes 66.9 tokens a second with 2 threads.")

    alone = Material("one", manifest(("alone",), student=False, budget=False))
    assert answer(alone) == "One member in int8-dynamic: 141 MB for cpu."
    assert [tile.what for tile in tiles(alone)] == ["member"]


def test_a_mixture_that_is_worse_is_said_to_be():
    found = evaluation()
    rows = [
        replace(
            row, overall=replace(row.overall, bits_per_byte=0.9 if row.name == "fitted" else row.overall.bits_per_byte)
        )
        for row in found.rows
    ]
    material = Material("experts", manifest(), replace(found, rows=tuple(rows)))

    assert "0.8% more than its best member, math" in answer(material)


def test_levels_show_how_far_one_leads():
    assert level(1 / 3, 3) == 0
    assert level(1.0, 3) == LEVELS
    assert level(0.5, 2) < level(0.8, 2) <= LEVELS


def test_neighbours_with_one_leader_are_one_stretch():
    weights = {"math": (0.9, 0.9, 0.1, 0.5), "code": (0.1, 0.1, 0.9, 0.5)}
    material = Material("two", manifest(("math", "code")), passages=(Passage("x", ("a", "b", "c", "d"), weights),))

    text = next(block for block in text_section(material).blocks if block.kind == "text")

    assert [(stretch.text, stretch.member, stretch.level) for stretch in text.stretches] == [
        ("ab", "math", 3),
        ("c", "code", 3),
        ("d", "math", 0),
    ]


def test_tones_are_told_apart():
    """A style sheet replaces light tones by name: two of them that are the same would both become one."""
    light = [tone.light for tone in TONES.values()]
    assert len(set(light)) == len(light)
    names = [f"m{at}" for at in range(10)]
    assert list(member_tones(names).values())[:8] == list(MEMBER_TONES)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_can_be_read(mode):
    """Contrast of text as WCAG 2.2 has it; members' tones have less, and labels beside them."""

    def contrast(one: str, other: str) -> float:
        brighter, darker = sorted(map(luminance, (one, other)), reverse=True)
        return (brighter + 0.05) / (darker + 0.05)

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    tone = {name: getattr(each, mode) for name, each in TONES.items()}
    for ground in ("paper", "wash", *(name for name in tone if name[0] == "h")):
        assert contrast(tone["ink"], tone[ground]) > 4.5
    assert contrast(tone["soft"], tone["paper"]) > 4.5
    assert contrast(tone["student"], tone["paper"]) > 3
    assert all(contrast(tone[name], tone["paper"]) > 2 for name in MEMBER_TONES)


@pytest.mark.parametrize(("weights", "rows"), [("", {"fitted"}), ("adaptive", {"adaptive"}), ("a=1,b=2", set())])
def test_speed_with_some_weights_stands_at_their_quality(weights, rows):
    material = Material("experts", manifest(), evaluation(), (), msgspec.structs.replace(profile(), weights=weights))

    assert {row.name for row, _, _ in _rates(material, evaluation()) if row.kind == "mixture"} == rows
