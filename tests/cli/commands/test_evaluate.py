"""`evaluate` and `fit-weights`."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgemix.bundle.reader import read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.cli import edgemix


@pytest.fixture
def texts(tmp_path):
    """Two files, each with the text of one member."""
    (tmp_path / "sums.txt").write_text("1+2=3")
    (tmp_path / "words.jsonl").write_text('{"word": "def x"}\n{"word": "ef"}\n')
    return [str(tmp_path / "sums.txt"), str(tmp_path / "words.jsonl"), "--template", "{word}"]


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


def test_tables_have_a_row_per_model_and_a_column_per_file(bundle, texts):
    result = run("evaluate", bundle, *texts)

    assert result.exit_code == 0
    for title in ("Files", "Bits per byte", "Perplexity"):
        assert title in result.stdout
    for row in ("math", "code", "uniform", "fitted", "fitted to numbers", "fitted to programs"):
        assert f"\n{row} " in result.stdout
    assert "sums    words   all files" in result.stdout
    assert "Greedy agreement with the mixture" in result.stdout
    assert "Decoding on this machine" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_json_figures(bundle, texts):
    output = json.loads(run("evaluate", bundle, *texts, "--json").stdout)

    rows = {row["name"]: row for row in output["rows"]}
    assert rows["math"]["files"]["sums"]["perplexity"] == pytest.approx(1, abs=0.01)
    assert rows["code"]["files"]["words"]["bits_per_byte"] == pytest.approx(0, abs=0.01)
    assert rows["uniform"]["files"]["sums"]["bits_per_byte"] == pytest.approx(1, abs=0.01)
    assert rows["math"]["overall"]["tokens"] == 4 + 4 + 1


def test_the_students_figures(student_bundle, texts):
    """After "1" and "+" its prediction is that of math, whose weight is 3/4; after "2" it predicts the end; then it is
    uniform, like code, whose weight is 1/4.
    """
    output = json.loads(run("evaluate", student_bundle, texts[0], "--json").stdout)

    rows = {row["name"]: row for row in output["rows"]}
    assert (output["provider"], output["mixture"]) == ("cpu", "given")
    assert list(rows) == ["math", "code", "uniform", "given", "adaptive", "student"]
    assert rows["student"]["kind"] == "student"
    assert rows["student"]["files"]["sums"]["agreement"] == 0.5
    assert rows["math"]["overall"]["agreement"] == 1
    assert rows["student"]["overall"]["acceptance"] == pytest.approx((0.75 + 0.75 + 0 + 0.25) / 4, abs=0.01)
    assert rows["math"]["overall"]["acceptance"] == pytest.approx(0.75, abs=0.01)
    assert rows["uniform"]["overall"]["agreement"] is None
    assert {name for name, row in rows.items() if row["decode_rate"]} == {"math", "code", "given", "student"}

    shown = run("evaluate", student_bundle, texts[0]).stdout
    assert "Acceptance rate as the mixture's draft" in shown
    assert rows["given"]["generation_rate"] > 0
    assert re.search(r"\ngiven +plain loop ", shown)
    assert re.search(r"\ngiven +as generated ", shown)
    assert shown.count("\nstudent ") == 5  # in every table but the one of the files


def test_speed_can_be_left_out(student_bundle, texts):
    output = json.loads(run("evaluate", student_bundle, texts[0], "--no-speed", "--json").stdout)

    assert all(row["decode_rate"] is None for row in output["rows"])
    assert "Decoding" not in run("evaluate", student_bundle, texts[0], "--no-speed").stdout


def test_max_tokens_limits_the_tokens_of_a_file(bundle, texts):
    output = json.loads(run("evaluate", bundle, *texts, "--max-tokens", 3, "--json").stdout)

    assert output["rows"][0]["files"]["sums"]["tokens"] == 2


def test_fit_weights_rewrites_the_manifest_and_nothing_else(own_bundle, texts):
    before = read_manifest(own_bundle)

    result = run("fit-weights", own_bundle, *texts)

    after = read_manifest(own_bundle)
    assert result.exit_code == 0
    assert after.weights.method == "fit"
    assert after.weights.default == pytest.approx({"math": 4 / 9, "code": 5 / 9}, abs=0.01)
    assert after.weights.domains["words"]["code"] == pytest.approx(1, abs=0.01)
    assert after.weights.adaptive
    assert after.files == before.files
    verify_bundle(own_bundle, after)


def test_fit_weights_of_a_read_only_bundle_fails_before_the_work(own_bundle, texts, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    def work(*_, **__):
        raise AssertionError("weights should not be fitted")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr("edgemix.export.stages.weights.fit_weights", work)

    result = run("fit-weights", own_bundle, *texts)

    assert result.exit_code == 2
    assert "edgemix.json: read-only file system" in result.stderr


def test_fit_weights_fixed(own_bundle, texts):
    assert run("fit-weights", own_bundle, *texts, "--fixed").exit_code == 0
    assert not read_manifest(own_bundle).weights.adaptive
    assert run("fit-weights", own_bundle, texts[0], "--adaptive").exit_code == 0
    assert read_manifest(own_bundle).weights.adaptive
    assert "adaptive" in run("inspect", own_bundle).stdout


def test_fit_weights_json(own_bundle, texts):
    output = json.loads(run("fit-weights", own_bundle, *texts, "--json").stdout)

    assert output["weights"]["method"] == "fit"
    assert set(output["weights"]["domains"]) == {"sums", "words"}


@pytest.mark.parametrize("command", ["evaluate", "fit-weights"])
def test_bad_files(bundle, tmp_path, command):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text":\n')
    (tmp_path / "one.txt").write_text("a")

    for name, message in [
        ("missing.txt", "no such file"),
        ("empty.txt", "has no text"),
        ("latin.txt", "is not UTF-8"),
        ("broken.jsonl", "broken.jsonl:2: is not a JSON object"),
        ("one.txt", "one"),
    ]:
        result = run(command, bundle, tmp_path / name)

        assert result.exit_code == 2
        assert message in result.stderr


def test_no_files(bundle):
    result = run("evaluate", bundle)

    assert result.exit_code == 2
    assert result.stderr.startswith("error: Missing argument 'FILE...'")
