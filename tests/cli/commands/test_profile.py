"""`profile`."""

from __future__ import annotations

import json
import os
import sys
import tempfile

import msgspec
import pytest
from click.testing import CliRunner
from helpers.hurry import hurry
from helpers.profiles import quantiles, sample_profile

from edgemix.bundle.reader import read_manifest
from edgemix.cli import edgemix
from edgemix.results.profile import encode_profile, read_profile
from edgemix.runtime import Mixture
from edgemix.runtime.machine.plan import CACHE


def run(*arguments: object):
    return CliRunner().invoke(edgemix, ["profile", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(student_bundle, tmp_path_factory):
    """One run with all output files: the folder, the result, and the saved plan."""
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setenv(CACHE, str(folder / "cache"))
        (folder / "temporary").mkdir()
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        options = ["--quick", "--recommend", "-o", folder / "profile.json", "--trace", folder / "trace.json"]
        options += ["--report", folder / "report.html"]
        result = run(student_bundle, *options, "--provider", "cpu", "--weights", "math=3,code=1")
        with Mixture.load(student_bundle, "cpu") as mixture:
            plan = mixture.plan
    assert result.exit_code == 0, result.stderr
    return folder, result, plan


@pytest.fixture
def saved(tmp_path):
    """A profile in a file."""
    (tmp_path / "before.json").write_bytes(encode_profile(sample_profile()))
    return tmp_path / "before.json"


def test_everything_that_generates_is_measured(measured, student_bundle):
    folder, _, _ = measured
    found = read_profile(folder / "profile.json")

    assert [result.name for result in found.results] == ["math", "code", "student", "mixture, plain", "mixture"]
    assert found.digest == read_manifest(student_bundle).checksum
    assert found.weights == "math=3,code=1"
    assert found.quick
    assert found.machine.bandwidth > 0
    assert found.loading.files == sum(entry.size for entry in read_manifest(student_bundle).files.values())
    assert found.loading.peak > found.loading.resident > 0
    for result in found.results:
        assert [prefill.tokens for prefill in result.prefill] == [8, 12]
        assert [decode.context for decode in result.decode] == [8]
        assert result.overhead is not None
        assert len(result.roofline) == (0 if result.name == "mixture" else 2)
    assert found.result("mixture").speculation is not None
    assert [batch.size for batch in found.result("mixture, plain").batches] == [2]
    assert [breakdown.graph for breakdown in found.breakdowns] == ["math", "code", "student"]
    assert any("energy" in note for note in found.notes) or found.results[0].energy


def test_the_report_shows_the_profile(measured):
    page = (measured[0] / "report.html").read_text("utf-8")

    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<figure") > 4
    assert "mixture, plain" in page


def test_a_report_without_its_extra_is_refused_before_measuring(student_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "edgemix.report.build", None)
    result = run(student_bundle, "--report", tmp_path / "report.html")

    assert result.exit_code == 1
    assert "edgemix[report]" in result.stderr


def test_the_fastest_configuration_is_saved_as_the_plan(measured):
    folder, result, plan = measured
    found = read_profile(folder / "profile.json")
    (chosen,) = [variant for variant in found.variants if variant.chosen]

    assert {variant.speculation for variant in found.variants} == {"off", "lookup", "student", "auto"}
    assert chosen.tpot.p50 <= 1.02 * min(variant.tpot.p50 for variant in found.variants)
    assert (plan.threads, plan.speculation, plan.tpot) == (chosen.threads, chosen.speculation, chosen.tpot.p50)
    assert "by the plan" in result.stderr


def test_the_trace_has_perfettos_format(measured):
    events = json.loads((measured[0] / "trace.json").read_bytes())["traceEvents"]

    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {"math", "code", "student", "mixture, plain", "mixture"}
    assert {"X", "M"} == {event["ph"] for event in events}


def test_the_tables_fit_into_a_terminal(measured):
    _, result, _ = measured

    for title in (
        "Decoding after 8 tokens",
        "Time to first token",
        "Loading",
        "Overhead outside ONNX",
        "Operators",
        "Roofline",
    ):
        assert title in result.stdout
    for title in ("Parts of the model", "Configurations of the mixture", "by batch size"):
        assert title in result.stdout
    tables = [line for line in result.stdout.splitlines() if not line.startswith(("mixture on", "cpu, "))]
    assert max(map(len, tables)) <= 80


def test_no_temporary_files_remain(measured):
    assert list((measured[0] / "temporary").iterdir()) == []
    files = {"profile.json", "trace.json", "report.html", "cache", "temporary"}
    assert {path.name for path in measured[0].iterdir()} == files


def test_json(bundle, monkeypatch, tmp_path):
    hurry(monkeypatch)
    (tmp_path / "text.txt").write_text("1+2=3 and so on")

    result = run(bundle, "--quick", "--json", "--file", tmp_path / "text.txt", "--threads", 1)

    output = json.loads(result.stdout)
    assert result.exit_code == 0
    assert output["machine"]["threads"] == 1
    assert output["variants"] == []
    assert [result["name"] for result in output["subjects"]] == ["math", "code", "mixture, plain", "mixture"]


def test_a_profile_is_shown_and_compared_without_measuring(saved, tmp_path):
    (tmp_path / "after.json").write_bytes(encode_profile(sample_profile(2.0)))

    shown = run(tmp_path / "after.json", "--compare", saved)

    assert shown.exit_code == 0
    assert "Ratios, this over the other" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["math", "TTFT,", "64", "tokens", "80.0", "ms", "40.0", "ms", "2.00", "worse"] in lines

    output = json.loads(run(tmp_path / "after.json", "--compare", saved, "--json").stdout)
    assert output["profile"]["bundle"] == "mixture"
    assert {ratio["verdict"] for ratio in output["comparison"]["ratios"]} == {"worse", "same"}
    assert json.loads(run(saved, "--json").stdout) == json.loads(saved.read_bytes())


@pytest.mark.parametrize("value", [0.0, -1e300, 1.7e308, 5e-324])
def test_absurd_numbers_are_shown(saved, tmp_path, value):
    """A profile is a file that may hold any number."""

    def absurd(thing):
        match thing:
            case float():
                return value
            case int() if not isinstance(thing, bool):
                return 10**400
            case str():
                return "\x1b[31m" + "x" * 200
            case dict():
                kept = {"schema", "kind", "phase", "bound"}
                return {key: each if key in kept else absurd(each) for key, each in thing.items()}
            case list():
                return [absurd(each) for each in thing]
        return thing

    document = absurd(json.loads(saved.read_bytes()))
    (tmp_path / "absurd.json").write_bytes(msgspec.json.encode(document))

    for arguments in (["absurd.json"], ["absurd.json", "--compare", saved], [saved, "--compare", "absurd.json"]):
        result = run(*(tmp_path / each if each == "absurd.json" else each for each in arguments))
        assert result.exit_code == 0, result.stderr
        assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "missing.json"], "there is no profile"),
        (["-o", "missing/profile.json"], "missing"),
        (["-o", "."], "is not a file"),
        (["--trace", os.devnull], "is not a file"),
        (["--file", "missing.txt"], "no such file"),
        (["--weights", "physics=1"], "there is no such member"),
        (["--threads", "0"], "is not in the range"),
    ],
)
def test_mistakes_are_reported_before_measuring(bundle, monkeypatch, tmp_path, arguments, message):
    def measure(*_, **__):
        raise AssertionError("nothing should be measured")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edgemix.runtime.profiling.loading.Loads", measure)

    result = run(bundle, *arguments)

    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_not_measured(saved):
    result = run(saved, "--quick")

    assert result.exit_code == 2
    assert "is a file: a saved profile" in result.stderr


def test_a_missing_bundle(tmp_path):
    result = run(tmp_path / "missing")

    assert result.exit_code == 2
    assert "missing" in result.stderr


def test_unstable_measurements_are_marked(saved):
    unstable = msgspec.structs.replace(sample_profile(), results=())
    loading = msgspec.structs.replace(unstable.loading, warm=quantiles(0.5, stable=False))
    saved.write_bytes(encode_profile(msgspec.structs.replace(unstable, loading=loading)))

    assert "~0.50" in run(saved).stdout


def test_an_interrupted_profile_writes_nothing(bundle, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    hurry(monkeypatch)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("edgemix.runtime.profiling.operators.read_calls", interrupt)

    result = run(bundle, "--quick", "-o", tmp_path / "profile.json")

    assert result.exit_code == 130
    assert "interrupted\nNothing was written." in result.stderr
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "profile.json").exists()
