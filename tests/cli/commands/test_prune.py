"""`prune`: the arguments that reach the library, and the output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from edgemix.bundle.manifest import PruningFigures
from edgemix.cli import edgemix
from edgemix.export.pruning.report import LayerReport, PruningReport, sum_reports
from edgemix.export.pruning.structure import Sizes
from edgemix.recipe.compression import Pruning


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


def report(after=2_400_000, zeros=1_000_000, kl=0.0321):
    """Return a report of two layers; the second is removed unless all parameters stay."""
    parts = (
        LayerReport("model.layers.0", 1_200_000, 1_200_000, zeros, 4_800_000, 950_000),
        LayerReport("model.layers.11", 1_200_000, after - 1_200_000, 0, 4_800_000, 0),
    )
    figures = PruningFigures(2_400_000, after, 0.4, 4_080, kl, 0.5, 1.25, 1.5)
    sizes = [Sizes(2, 1536, 3), Sizes(1 if after < 2_400_000 else 2, 1536, 3)]
    return PruningReport(*sizes, parts, sum_reports(parts), figures, recovery_steps=34, recovery_seconds=299.6)


@pytest.fixture
def prune(monkeypatch, tmp_path):
    """Run the command with a library that returns or raises `answer`; returns the result and the calls."""
    text = tmp_path / "prose.txt"
    text.write_text("some prose")

    def command(answer, *arguments):
        calls = []

        def function(*given, progress, **options):
            calls.append((given, options))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setitem(sys.modules, "edgemix.export.pruning.prune", SimpleNamespace(prune=function))
        return run("prune", "base", "-o", "out", "--text", text, *arguments), calls

    return command


def test_prune(prune):
    options = ("--ffn", 0.25, "--sparsity", 0.5, "--steps", 2, "--recover", 0, "--adapter", "law", "--seed", 3)

    result, calls = prune(report(1_200_000), *options)

    pruning = Pruning(ffn=0.25, sparsity=0.5, steps=2, recover=0)
    assert result.exit_code == 0
    assert calls == [(("base", Path("out"), {"prose": ["some prose"]}, pruning), {"adapter": "law", "seed": 3})]
    for line in (
        "2 layers, 1536 channels, 3 key-value heads before",
        "34 steps, 300 s",
        "0.0321 nats per token on 4,080 held-out tokens",
        "model.layers.11    1,200,000           0           0     0.0      4.8     0.0",
        "In a recipe: {name: out, model: out}",
    ):
        assert line in result.stdout
    tables = result.stdout.partition("Zeros save space, not time")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "Over the limits" not in result.stderr


def test_prune_in_json(prune):
    result, _ = prune(report(), "--sparsity", 0.5, "--json")
    output = json.loads(result.stdout)
    assert (output["output"], output["figures"]["kl"]) == ("out", 0.0321)
    assert "Zeros save space, not time" in output["speed"]


def test_a_high_loss_is_reported(prune):
    assert "Over the limits of the parity gate" in prune(report(kl=0.6), "--sparsity", 0.5)[0].stderr


def test_a_share_that_rounds_to_zero_is_reported(prune):
    """Regression: the tables alone looked like those of a pruned model."""
    assert "Nothing was cut" in prune(report(zeros=0), "--ffn", 0.001)[0].stderr
    assert "Nothing was cut" not in prune(report(1_200_000, zeros=0), "--layers", 0.5)[0].stderr
    assert "Nothing was cut" not in prune(report(), "--sparsity", 0.5)[0].stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --layers, --ffn, --heads, --sparsity or --pattern 2:4"),
        (("--ffn", "nan"), "not a finite number"),
        (("--ffn", 1), "not in the range 0<=x<=0.95"),
        (("--pattern", "2:4", "--sparsity", 0.3), "two of every four weights is 0.5"),
        (("--ffn", 0.5, "--template", "{a}"), "--template is for .jsonl"),
    ],
)
def test_mistakes(prune, arguments, message):
    result, calls = prune(report(), *arguments)
    assert (result.exit_code, calls) == (2, [])
    assert message in result.stderr


def test_interrupted(prune):
    result, _ = prune(KeyboardInterrupt(), "--ffn", 0.5)
    assert result.exit_code == 130
    assert "Nothing was written" in result.stderr
