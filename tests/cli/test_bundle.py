"""`inspect` and `verify`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgemix.bundle import MANIFEST, TOKENIZER
from edgemix.cli import edgemix


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


def test_inspect_shows_members_sources_and_weights(bundle):
    result = run("inspect", bundle)

    assert result.exit_code == 0
    assert "for cpu, by edgemix 0.1.0" in result.output
    for line in (
        "math     fp32     mobius",
        "math     closed-form",
        "default    0.750   0.250",
        "programs   0.000   1.000",
    ):
        assert line in result.output
    assert max(map(len, result.output.splitlines()[1:])) <= 80


def test_inspect_json_is_the_manifest(bundle):
    result = run("inspect", bundle, "--json")

    shown, stored = json.loads(result.stdout), json.loads((bundle / MANIFEST).read_text())
    assert shown.pop("bundle") == str(bundle)
    assert shown.pop("bytes") == sum(entry["size"] for entry in stored["files"].values())
    assert {key: shown[key] for key in stored} == stored


def test_verify_a_whole_bundle(bundle):
    assert "is whole: 4 files" in run("verify", bundle).stdout
    assert json.loads(run("verify", bundle, "--json").stdout)["whole"] is True


@pytest.mark.parametrize("name", [TOKENIZER, "members/math/model.onnx", "tokenizer/chat_template.jinja"])
def test_verify_finds_one_flipped_bit(own_bundle, name):
    path = own_bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    result = run("verify", own_bundle)

    assert result.exit_code == 2
    assert f"{name} has changed" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_damaged_manifest(own_bundle, command):
    (own_bundle / MANIFEST).write_text("{")

    result = run(command, own_bundle)

    assert result.exit_code == 2
    assert "edgemix.json is damaged" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "generate", "chat", "evaluate", "fit-weights"])
def test_no_bundle(tmp_path, command):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    more = {"generate": ["hello"], "evaluate": [text], "fit-weights": [text]}.get(command, [])

    for path, message in [
        (tmp_path / "missing", "there is no such bundle"),
        (text, "is not a folder"),
        (tmp_path, "has no edgemix.json"),
    ]:
        result = run(command, path, *more, "--json")

        assert result.exit_code == 2
        assert message in result.stderr
        assert message in json.loads(result.stdout)["error"]["message"]
