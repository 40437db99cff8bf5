"""The page: whole, well formed, self-contained, and nobody's markup but its own."""

from __future__ import annotations

import re
from dataclasses import replace

import msgspec
import pytest
from helpers.reading import Reading
from helpers.samples import FIGURES, bare, evaluation, manifest, passages, profile

from edgemix.report import build_report
from edgemix.results.evaluation import Passage
from edgemix.results.profile import Decode, Prefill, Quantiles

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def reading(whole):
    return Reading.of(whole.html)


def test_it_is_well_formed(reading):
    assert reading.faults == []
    ids = [element.attributes["id"] for element in reading.elements if "id" in element.attributes]
    assert len(set(ids)) == len(ids)


def test_every_figure_is_there_at_two_widths_with_a_title(reading):
    assert {figure.attributes["id"] for figure in reading.all("figure")} == FIGURES
    drawings = reading.all("svg")
    for width in ("wide", "narrow"):
        assert sum(drawing.attributes["class"] == width for drawing in drawings) == len(FIGURES)
    titles = {title.attributes.get("id"): title.text for title in reading.all("title")}
    assert all(titles[drawing.attributes["aria-labelledby"]] for drawing in drawings)
    assert all(drawing.attributes["role"] == "img" for drawing in drawings)


def test_it_needs_nothing_else(whole, reading):
    assert not reading.all("script")
    for element in reading.elements:
        assert not any(name.startswith("on") for name in element.attributes)
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert element.attributes.get(name, "#").startswith(("#", "data:,"))
    assert "://" not in whole.html
    assert "@import" not in whole.html
    references = re.findall(r"url\(#([^)]*)\)", whole.html)
    ids = {element.attributes.get("id") for element in reading.elements}
    assert set(references) <= ids
    assert len(re.findall(r"url\(", whole.html)) == len(references)


def test_it_says_what_there_is_to_say(reading):
    (header,) = reading.all("header")
    assert "0.847 bits per byte of these texts, 5.2% fewer than its best member, math" in header.text
    assert "66.9 tokens a second with 2 threads" in header.text
    (main,) = reading.all("main")
    assert "The rate of a batch of 16 was not steady." in main.text
    assert "not measured" not in main.text.lower()


def test_text_in_drawings_is_text(reading):
    said = {element.text for element in reading.all("text")}
    assert {"math", "mixture, plain", "DynamicQuantizeMatMul", "bits per byte (fewer is better)"} <= said


def test_a_dark_tone_replaces_every_light_one(whole, reading):
    """What has a colour in a drawing has a rule in the style sheet: nothing stays as it was on light paper."""
    style = reading.all("style")[0].text
    used = {
        (name, element.attributes[name])
        for element in reading.elements
        for name in ("fill", "stroke")
        if element.attributes.get(name, "none") not in {"none", "transparent"}
    }
    assert used
    for name, tone in used:
        assert f'svg [{name}="{tone}"]{{{name}:var(' in style


def test_names_and_texts_are_never_markup():
    evil_texts = tuple(f"{EVIL}{at}" for at in range(3))
    told = profile()
    told = msgspec.structs.replace(
        told,
        machine=msgspec.structs.replace(told.machine, processor=EVIL),
        subjects=tuple(msgspec.structs.replace(each, name=EVIL + each.name, format=EVIL) for each in told.subjects),
        breakdowns=tuple(
            msgspec.structs.replace(
                each,
                graph=EVIL + each.graph,
                operators=tuple(msgspec.structs.replace(op, type=EVIL + op.type) for op in each.operators),
            )
            for each in told.breakdowns
        ),
        variants=tuple(msgspec.structs.replace(each, provider=EVIL) for each in told.variants),
        notes=(EVIL,),
    )
    entries = manifest()
    members = tuple(
        msgspec.structs.replace(
            each, source=msgspec.structs.replace(each.source, model=f'"><img src=x onerror={at}>', license=EVIL)
        )
        for at, each in enumerate(entries.members)
    )
    domains = {EVIL: entries.weights.default}
    entries = msgspec.structs.replace(
        entries,
        members=members,
        weights=msgspec.structs.replace(entries.weights, domains=domains),
        versions={EVIL: EVIL},
    )

    page = build_report(
        EVIL,
        entries,
        evaluation=evaluation(texts=evil_texts),
        passages=passages(texts=evil_texts),
        profile=told,
    )

    reading = Reading.of(page.html)
    assert reading.faults == []
    assert not reading.all("script")
    assert not reading.all("img")
    assert not any(name.startswith("on") for element in reading.elements for name in element.attributes)
    assert reading.all("h1")[0].text == EVIL
    said = [element.text for element in reading.all("text")]
    assert any(EVIL in text for text in said)
    assert any(EVIL in element.text for element in reading.all("th"))


def test_what_is_no_text_is_replaced():
    pieces = ("a\x1b[31m", "\x00", "\ud800", "\u202e", "\r\n", "\tπ")
    weights = {name: (1 / 3,) * len(pieces) for name in ("math", "code", "wiki")}
    passage = Passage("x\x07", pieces, weights)

    page = build_report("b\udcff", manifest(), passages=(passage,)).html

    assert page.encode()
    words = next(element for element in Reading.of(page).elements if element.attributes.get("class") == "words")
    assert words.text == "a\ufffd[31m\ufffd\ufffd\ufffd\r\n\tπ"
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", page)


def test_long_texts_are_bounded():
    pieces = ("word ",) * 9_000
    weights = {name: (1 / 3,) * len(pieces) for name in ("math", "code", "wiki")}

    page = build_report("experts", manifest(), passages=(Passage("long", pieces, weights),) * 3).html

    assert 3900 < page.count("word ") <= 4000
    assert "Further passages are left out" in page


def test_what_is_missing_is_named():
    page = build_report("experts", manifest())

    assert len(page.missing) == 4
    assert sum("Give texts" in each for each in page.missing) == 2
    assert sum("Give a profile" in each for each in page.missing) == 2
    reading = Reading.of(page.html)
    assert {figure.attributes["id"] for figure in reading.all("figure")} == {"weights", "quantisation", "budget"}
    assert (
        "A mixture of 3 members in int8-dynamic and a student in int4: 473 MB for cpu." in reading.all("header")[0].text
    )


def test_a_bundle_of_one_member():
    names = ("alone",)
    page = build_report("one", manifest(names, student=False, budget=False), profile=bare(profile(names)))

    assert Reading.of(page.html).faults == []
    assert "this one has one member" in " ".join(page.missing)


def test_more_members_than_colours():
    names = tuple(f"expert-{at}" for at in range(11))

    page = build_report("many", manifest(names), profile=bare(profile(names)))

    assert Reading.of(page.html).faults == []


def test_a_member_that_calls_a_token_impossible():
    """Endless bits per byte: it has no place in a chart, and the table says inf."""
    found = evaluation()

    worst = found.rows[0]
    overall = replace(worst.overall, bits_per_byte=float("inf"), perplexity=float("inf"))
    rows = (replace(worst, overall=overall, files=dict.fromkeys(worst.files, overall)), *found.rows[1:])

    page = build_report("experts", manifest(), evaluation=replace(found, rows=rows)).html

    assert ">inf<" in page
    assert "NaN" not in page


def test_few_figures_in_a_profile():
    page = build_report("experts", manifest(), profile=bare(profile()))

    shown = {figure.attributes["id"] for figure in Reading.of(page.html).all("figure")}
    assert shown == {"tpot", "weights", "quantisation", "budget"}
    assert "neither a roofline nor operators' times" in " ".join(page.missing)


def test_one_prompt_length_is_shown_as_a_distribution():
    told = profile()
    subjects = tuple(
        msgspec.structs.replace(each, prefill=told.subjects[0].prefill[:1]) for each in bare(told).subjects
    )

    page = build_report("experts", manifest(), profile=msgspec.structs.replace(bare(told), subjects=subjects))

    assert "Time to first token, of a prompt of 16 tokens" in page.shown


def test_what_is_known_comes_first():
    headings = [heading.text for heading in Reading.of(build_report("experts", manifest()).html).all("h2")]

    assert headings[0] == "What is in the bundle"
    assert headings[-1] == "How this was made"


def test_figures_of_every_size_can_be_drawn():
    tiny, huge = (Quantiles(value, value, value, 0.0, 1) for value in (1e-9, 1e9))
    odd = bare(profile())
    subjects = tuple(
        msgspec.structs.replace(
            each,
            prefill=(Prefill(16, tiny), Prefill(64, huge)),
            decode=(Decode(0, huge if at else tiny), Decode(9, tiny)),
        )
        for at, each in enumerate(odd.subjects)
    )

    page = build_report("experts", manifest(), profile=msgspec.structs.replace(odd, subjects=subjects)).html

    assert "NaN" not in page
    assert Reading.of(page).faults == []
