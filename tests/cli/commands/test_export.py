"""`export`: the arguments that reach the library, and the output."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from edgemix.bundle.manifest import BudgetFigures, BudgetPoint, MixtureParity, QuantizationParity
from edgemix.bundle.reader import read_manifest
from edgemix.cli import edgemix


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


def test_export(library, recipe, bundle):
    import msgspec

    manifest = read_manifest(bundle)
    stored = QuantizationParity(4096, 0.01234, 0.1, 0.0456, 0.1, 1.0123, 1.1, decode_kl=0.02)
    first = msgspec.structs.replace(manifest.members[0], format="int8", quantization=stored, forced=True)
    first = msgspec.structs.replace(first, fallbacks=("mobius: the graph does not load",))
    mixed = MixtureParity(manifest.weights.default, 1024, 0.0066, 0.02, 1.003)
    manifest = msgspec.structs.replace(manifest, members=(first, *manifest.members[1:]), quantization=mixed)
    calls = library("edgemix.export.pipeline", "export_bundle", manifest)

    result = run("export", recipe, "-o", "out", "--force")

    (built, output), options = calls[0]
    assert result.exit_code == 0
    assert [member.name for member in built.members] == ["a"]
    assert output == Path("out")
    assert options["force"] is True
    assert "math      0.0e+00   0.0123        0.0200      4.56       1.0123      yes" in result.stdout
    assert "mixture             0.0066                    2.00       1.0030" in result.stdout
    assert "math: mobius: the graph does not load" in result.stdout
    assert "Next: edgemix generate out" in result.stdout
    assert "Next: edgemix generate 'my out' " in run("export", recipe, "-o", "my out").stdout  # as a shell needs it
    output = json.loads(run("export", recipe, "-o", "out", "--json").stdout)
    assert output["members"][0]["quantization"]["kl"] == 0.01234


def test_export_within_a_budget(library, recipe, bundle):
    from edgemix.export.budget.plan import ResourceBudget

    manifest = read_manifest(bundle)
    names = [member.name for member in manifest.members]
    members = tuple(
        msgspec.structs.replace(member, format=form, eight_bits=share)
        for member, form, share in zip(manifest.members, ("int4", "int8"), (0.375, 0.0), strict=True)
    )
    points = tuple(BudgetPoint(int(size * 1e6), size / 1e4, 1 / size) for size in (100, 180, 200, 400))
    figures = BudgetFigures(
        bytes=200_000_000,
        seconds=0.02,
        chosen=points[1],
        losses=dict(zip(names, (0.01234, 0.00012), strict=True)),
        curve=points,
        measured=0.0191,
    )
    manifest = msgspec.structs.replace(manifest, members=members, budget=figures)
    calls = library("edgemix.export.pipeline", "export_bundle", manifest)

    result = run("export", recipe, "-o", "out", "--budget", "200MB", "--max-tpot", "20 ms")

    assert result.exit_code == 0, result.stderr
    assert calls[0][1]["budget"] == ResourceBudget(200_000_000, 0.02)
    shown = [line.split() for line in result.stdout.splitlines()]
    assert ["math", "int4", "38"] in [line[:3] for line in shown]
    assert ["math", "0.01234"] in [[*line[:1], *line[-1:]] for line in shown]
    assert ["code", "int8"] in [line[:2] for line in shown]
    assert "Limits: 200.0 MB, 20.00 ms per token (planned 18.00, measured 19.10)" in result.stdout
    assert ["180.0", "18.00", "0.00556", "chosen"] in shown
    assert ["400.0", "40.00", "0.00250"] in shown
    assert json.loads(run("export", recipe, "-o", "out", "--json").stdout)["budget"]["measured"] == 0.0191
    run("export", recipe, "-o", "out", "--max-tpot", "0.02s")
    run("export", recipe, "-o", "out")
    assert [options.get("budget") for _, options in calls[2:]] == [ResourceBudget(None, 0.02), None]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--budget", "lots", "'lots' is not a size like 250MB"),
        ("--budget", "0MB", "'0MB' is not above zero"),
        ("--budget", "250 parsecs", "unknown unit 'parsecs'"),
        ("--max-tpot", "20", "'20' has no unit; write it like 20ms"),
        ("--max-tpot", "-20ms", "is not above zero"),
    ],
)
def test_invalid_budgets_are_usage_errors(library, recipe, option, value, message):
    calls = library("edgemix.export.pipeline", "export_bundle", None)

    result = run("export", recipe, "-o", "out", option, value)

    assert (result.exit_code, calls) == (2, [])
    assert f"error: Invalid value for '{option}': " in result.stderr
    assert message in result.stderr


def test_export_interrupted(library, recipe, monkeypatch, tmp_path):
    """What is kept is said where something is kept."""
    monkeypatch.chdir(tmp_path)
    library("edgemix.export.pipeline", "export_bundle", KeyboardInterrupt())

    result = run("export", recipe, "-o", "out")
    assert result.exit_code == 130
    assert "interrupted\nNothing was written" in result.stderr

    Path(".out.partial").mkdir()
    result = run("export", recipe, "-o", "out")
    assert "interrupted\nNo bundle was written, but finished stages are kept" in result.stderr
