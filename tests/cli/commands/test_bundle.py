"""`inspect` and `verify`."""

from __future__ import annotations

import json

import msgspec
import pytest
from click.testing import CliRunner

from edgemix.bundle.manifest import MANIFEST, TOKENIZER, MixtureParity, PruningFigures
from edgemix.bundle.reader import read_manifest
from edgemix.bundle.writer import write_manifest
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


def test_inspect_shows_the_student_and_the_mixtures_parity(own_bundle, student_bundle):
    shown = run("inspect", student_bundle).output
    assert shown.count("\nstudent ") == 3  # members, sources, parity
    assert "student: drafts 11 of 258 tokens" in shown

    def shown(weights):
        parity = MixtureParity(weights, tokens=1024, kl=0.0066, top1_disagreement=0.02, perplexity_ratio=1.003)
        write_manifest(own_bundle, msgspec.structs.replace(read_manifest(own_bundle), quantization=parity))
        return " ".join(run("inspect", own_bundle).output.split())

    same, other = shown({"math": 0.75, "code": 0.25}), shown({"math": 0.5, "code": 0.5})
    assert " mixture 0.0066 2.00 1.0030 " in same
    assert "other weights" not in same
    assert "measured with other weights: math 0.500, code 0.500" in other
    assert max(map(len, run("inspect", own_bundle).output.splitlines()[1:])) <= 80


def test_inspect_shows_what_was_pruned(own_bundle):
    manifest = read_manifest(own_bundle)
    assert "Pruning" not in run("inspect", own_bundle).output
    figures = PruningFigures(2_000_000, 1_500_000, 0.5, 4096, 0.0321, 0.5, 1.0416, 1.5)
    pruned = msgspec.structs.replace(manifest.members[0], pruning=figures)
    write_manifest(own_bundle, msgspec.structs.replace(manifest, members=(pruned, *manifest.members[1:])))

    result = run("inspect", own_bundle)

    assert " math 2.0 1.5 50.0 0.0321 1.0416 " in " ".join(result.output.split())
    assert max(map(len, result.output.splitlines()[1:])) <= 80


def test_inspect_json_is_the_manifest(bundle):
    result = run("inspect", bundle, "--json")

    shown, stored = json.loads(result.stdout), json.loads((bundle / MANIFEST).read_text())
    assert shown.pop("bundle") == str(bundle)
    assert shown.pop("bytes") == sum(entry["size"] for entry in stored["files"].values())
    assert {key: shown[key] for key in stored} == stored


def test_verify_an_intact_bundle(bundle):
    assert "is intact: 4 files" in run("verify", bundle).stdout
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
