"""`edgemix report`."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner
from helpers.samples import bare, profile

from edgemix.bundle.reader import read_manifest
from edgemix.cli import edgemix
from edgemix.results.profile import encode_profile


@pytest.fixture
def texts(tmp_path):
    """Two files, each with the text of one member."""
    (tmp_path / "sums.txt").write_text("1+2=3" * 4)
    (tmp_path / "words.jsonl").write_text('{"word": "def x"}\n{"word": "ef"}\n')
    return [str(tmp_path / "sums.txt"), str(tmp_path / "words.jsonl"), "--template", "{word}"]


@pytest.fixture
def page(tmp_path):
    return tmp_path / "page.html"


def run(*arguments: object):
    return CliRunner().invoke(edgemix, ["report", *map(str, arguments)])


def test_a_bundle_alone_is_described(bundle, page):
    result = run(bundle, "-o", page)

    assert result.exit_code == 0
    assert f"{page}: " in result.stdout
    assert "Give texts to see how well members and mixture predict them" in result.stdout
    assert "Weights of the members in the mixture" in page.read_text("utf-8")


def test_texts_are_measured_and_shown(student_bundle, texts, page):
    result = run(student_bundle, *texts, "-o", page, "--json")

    output = json.loads(result.stdout)
    assert output["report"] == str(page)
    assert {"Quality against size", "Quality against speed", "Bits per byte by text"} <= set(output["shown"])
    assert {"A stream that alternates between the texts", "From sums", "From words"} <= set(output["shown"])
    assert all("profile" in missing for missing in output["missing"])
    shown = page.read_text("utf-8")
    assert '<span class="m0 l4" title="math">' in shown
    assert '<span class="m1 l4" title="code">' in shown
    assert "tokens per second on the machine that made this report" in shown


def test_with_a_profile_speed_is_not_measured(bundle, texts, page, tmp_path, monkeypatch):
    def measure(*_, **__):
        raise AssertionError("speed should not be measured")

    monkeypatch.setattr("edgemix.runtime.evaluation.evaluate.decoding_rates", measure)
    file = tmp_path / "profile.json"
    file.write_bytes(encode_profile(profile(("math", "code"), read_manifest(bundle).checksum)))

    output = json.loads(run(bundle, *texts, "--profile", file, "-o", page, "--json").stdout)

    assert output["missing"] == []
    assert {"Roofline", "Decode time by operator", "Quality against speed"} <= set(output["shown"])
    assert "another bundle or another version" not in page.read_text("utf-8")


def test_a_profile_of_another_bundle_is_reported(bundle, page, tmp_path):
    (tmp_path / "profile.json").write_bytes(encode_profile(bare(profile())))

    run(bundle, "--profile", tmp_path / "profile.json", "-o", page)

    assert "another bundle or another version of this one" in page.read_text("utf-8")


def test_text_tokens_limits_the_colored_tokens(bundle, texts, page):
    run(bundle, texts[0], "--text-tokens", 3, "--no-speed", "-o", page)

    assert (
        "1+2="
        not in page.read_text("utf-8").replace("</span>", "").partition('class="tokens"')[2].partition("</div>")[0]
    )


def test_mistakes_are_reported_before_any_work(bundle, texts, page, tmp_path, monkeypatch):
    def work(*_, **__):
        raise AssertionError("the bundle should not be loaded")

    monkeypatch.setattr("edgemix.runtime.Mixture.load", work)
    (tmp_path / "broken.json").write_text("{}")
    unsound = json.loads(encode_profile(profile()))
    unsound["subjects"][0]["decode"][0]["tpot"]["p50"] = 0
    (tmp_path / "unsound.json").write_text(json.dumps(unsound))

    for arguments, message in [
        ((bundle, *texts, "-o", tmp_path), "is not a file"),
        ((bundle, *texts, "-o", tmp_path / "none" / "page.html"), "there is no folder"),
        ((bundle, *texts, "-o", page, "--profile", tmp_path / "none.json"), "there is no profile"),
        (
            (bundle, *texts, "-o", page, "--profile", tmp_path / "broken.json"),
            "is not a profile that this edgemix reads",
        ),
        (
            (bundle, *texts, "-o", page, "--profile", tmp_path / "unsound.json"),
            "tpot.p50 is 0.0, which is out of range",
        ),
        ((bundle, tmp_path / "none.txt", "-o", page), "no such file"),
        ((tmp_path / "none", *texts, "-o", page), "there is no such bundle"),
    ]:
        result = run(*arguments)

        assert result.exit_code == 2
        assert message in result.stderr
        assert not page.exists()


def test_without_altair_the_extra_is_named_before_any_work(bundle, texts, page, monkeypatch):
    def work(*_, **__):
        raise AssertionError("the bundle should not be loaded")

    monkeypatch.setattr("edgemix.runtime.Mixture.load", work)
    for name in [name for name in sys.modules if name.startswith("edgemix.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)

    result = run(bundle, *texts, "-o", page)

    assert result.exit_code == 1
    assert "a report needs altair" in result.stderr
    assert "pip install 'edgemix[report]'" in result.stderr


def test_an_interrupted_report_leaves_the_old_one(bundle, texts, page, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    page.write_text("old")
    monkeypatch.setattr("edgemix.runtime.evaluation.weight_traces.trace_weights", interrupt)

    result = run(bundle, *texts, "--no-speed", "-o", page)

    assert result.exit_code == 130
    assert "Nothing was written." in result.stderr
    assert page.read_text() == "old"
