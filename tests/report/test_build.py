"""The page is complete, well formed and self-contained, and escapes all text."""

from __future__ import annotations

import re
from dataclasses import replace

import msgspec
import pytest
from helpers.html_page import HtmlPage
from helpers.samples import FIGURES, bare, evaluation, manifest, profile, weight_traces

from edgemix.report import build_report
from edgemix.results.evaluation import WeightTrace
from edgemix.results.profile import Decode, Prefill, Quantiles

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def parsed(whole):
    return HtmlPage.parse(whole.html)


def test_the_page_is_well_formed(parsed):
    assert parsed.errors == []
    ids = [element.attributes["id"] for element in parsed.elements if "id" in element.attributes]
    assert len(set(ids)) == len(ids)


def test_every_figure_has_two_widths_and_a_title(parsed):
    assert {figure.attributes["id"] for figure in parsed.all("figure")} == FIGURES
    drawings = parsed.all("svg")
    for width in ("wide", "narrow"):
        assert sum(drawing.attributes["class"] == width for drawing in drawings) == len(FIGURES)
    titles = {title.attributes.get("id"): title.text for title in parsed.all("title")}
    assert all(titles[drawing.attributes["aria-labeledby"]] for drawing in drawings)
    assert all(drawing.attributes["role"] == "img" for drawing in drawings)


def test_the_page_loads_no_other_resource(whole, parsed):
    assert not parsed.all("script")
    for element in parsed.elements:
        assert not any(name.startswith("on") for name in element.attributes)
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert element.attributes.get(name, "#").startswith(("#", "data:,"))
    assert "://" not in whole.html
    assert "@import" not in whole.html
    references = re.findall(r"url\(#([^)]*)\)", whole.html)
    ids = {element.attributes.get("id") for element in parsed.elements}
    assert set(references) <= ids
    assert len(re.findall(r"url\(", whole.html)) == len(references)


def test_a_complete_report_misses_nothing(parsed):
    (header,) = parsed.all("header")
    assert "0.847 bits per byte on these texts, 5.2% fewer than its best member, math" in header.text
    assert "66.9 tokens per second with 2 threads" in header.text
    (main,) = parsed.all("main")
    assert "The rate of a batch of 16 was not stable." in main.text
    assert "not measured" not in main.text.lower()


def test_labels_in_charts_are_text_elements(parsed):
    labels = {element.text for element in parsed.all("text")}
    assert {"math", "mixture, plain", "DynamicQuantizeMatMul", "bits per byte (lower is better)"} <= labels


def test_every_light_color_has_a_dark_one(whole, parsed):
    """Every fill and stroke in a chart has a rule in the style sheet that replaces it in dark mode."""
    style = parsed.all("style")[0].text
    used = {
        (name, element.attributes[name])
        for element in parsed.elements
        for name in ("fill", "stroke")
        if element.attributes.get(name, "none") not in {"none", "transparent"}
    }
    assert used
    for name, color in used:
        assert f'svg [{name}="{color}"]{{{name}:var(' in style


def test_names_and_texts_are_escaped():
    evil_texts = tuple(f"{EVIL}{at}" for at in range(3))
    full = profile()
    evil_profile = msgspec.structs.replace(
        full,
        machine=msgspec.structs.replace(full.machine, processor=EVIL),
        results=tuple(msgspec.structs.replace(each, name=EVIL + each.name, format=EVIL) for each in full.results),
        breakdowns=tuple(
            msgspec.structs.replace(
                each,
                graph=EVIL + each.graph,
                operators=tuple(msgspec.structs.replace(op, type=EVIL + op.type) for op in each.operators),
            )
            for each in full.breakdowns
        ),
        variants=tuple(msgspec.structs.replace(each, provider=EVIL) for each in full.variants),
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
        traces=weight_traces(texts=evil_texts),
        profile=evil_profile,
    )

    parsed = HtmlPage.parse(page.html)
    assert parsed.errors == []
    assert not parsed.all("script")
    assert not parsed.all("img")
    assert not any(name.startswith("on") for element in parsed.elements for name in element.attributes)
    assert parsed.all("h1")[0].text == EVIL
    labels = [element.text for element in parsed.all("text")]
    assert any(EVIL in text for text in labels)
    assert any(EVIL in element.text for element in parsed.all("th"))


def test_unprintable_characters_are_replaced():
    pieces = ("a\x1b[31m", "\x00", "\ud800", "\u202e", "\r\n", "\tπ")
    weights = {name: (1 / 3,) * len(pieces) for name in ("math", "code", "wiki")}
    trace = WeightTrace("x\x07", pieces, weights)

    page = build_report("b\udcff", manifest(), traces=(trace,)).html

    assert page.encode()
    tokens = next(element for element in HtmlPage.parse(page).elements if element.attributes.get("class") == "tokens")
    assert tokens.text == "a\ufffd[31m\ufffd\ufffd\ufffd\r\n\tπ"
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", page)


def test_long_texts_are_truncated():
    pieces = ("word ",) * 9_000
    weights = {name: (1 / 3,) * len(pieces) for name in ("math", "code", "wiki")}

    page = build_report("experts", manifest(), traces=(WeightTrace("long", pieces, weights),) * 3).html

    assert 3900 < page.count("word ") <= 4000
    assert "Further texts are left out" in page


def test_missing_inputs_are_named():
    page = build_report("experts", manifest())

    assert len(page.missing) == 4
    assert sum("Give texts" in each for each in page.missing) == 2
    assert sum("Give a profile" in each for each in page.missing) == 2
    parsed = HtmlPage.parse(page.html)
    assert {figure.attributes["id"] for figure in parsed.all("figure")} == {"weights", "quantization", "budget"}
    assert (
        "A mixture of 3 members in int8-dynamic and a student in int4: 473 MB for cpu." in parsed.all("header")[0].text
    )


def test_a_bundle_of_one_member():
    names = ("alone",)
    page = build_report("one", manifest(names, student=False, budget=False), profile=bare(profile(names)))

    assert HtmlPage.parse(page.html).errors == []
    assert "this one has one member" in " ".join(page.missing)


def test_more_members_than_colors():
    names = tuple(f"expert-{at}" for at in range(11))

    page = build_report("many", manifest(names), profile=bare(profile(names)))

    assert HtmlPage.parse(page.html).errors == []


def test_infinite_bits_per_byte():
    """A member that assigns a token no probability is left out of charts, and the table says inf."""
    found = evaluation()

    worst = found.rows[0]
    overall = replace(worst.overall, bits_per_byte=float("inf"), perplexity=float("inf"))
    rows = (replace(worst, overall=overall, files=dict.fromkeys(worst.files, overall)), *found.rows[1:])

    page = build_report("experts", manifest(), evaluation=replace(found, rows=rows)).html

    assert ">inf<" in page
    assert "NaN" not in page


def test_a_minimal_profile():
    page = build_report("experts", manifest(), profile=bare(profile()))

    shown = {figure.attributes["id"] for figure in HtmlPage.parse(page.html).all("figure")}
    assert shown == {"tpot", "weights", "quantization", "budget"}
    assert "neither a roofline nor operators' times" in " ".join(page.missing)


def test_a_single_prompt_length_is_shown_as_a_distribution():
    full = profile()
    results = tuple(msgspec.structs.replace(each, prefill=full.results[0].prefill[:1]) for each in bare(full).results)

    page = build_report("experts", manifest(), profile=msgspec.structs.replace(bare(full), results=results))

    assert "Time to first token, for a prompt of 16 tokens" in page.shown


def test_sections_with_data_come_first():
    headings = [heading.text for heading in HtmlPage.parse(build_report("experts", manifest()).html).all("h2")]

    assert headings[0] == "What is in the bundle"
    assert headings[-1] == "How this was measured"


def test_very_small_and_very_large_figures_are_drawn():
    tiny, huge = (Quantiles(value, value, value, 0.0, 1) for value in (1e-9, 1e9))
    odd = bare(profile())
    results = tuple(
        msgspec.structs.replace(
            each,
            prefill=(Prefill(16, tiny), Prefill(64, huge)),
            decode=(Decode(0, huge if at else tiny), Decode(9, tiny)),
        )
        for at, each in enumerate(odd.results)
    )

    page = build_report("experts", manifest(), profile=msgspec.structs.replace(odd, results=results)).html

    assert "NaN" not in page
    assert HtmlPage.parse(page).errors == []
