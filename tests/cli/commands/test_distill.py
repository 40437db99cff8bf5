"""`distill`: the arguments that reach the library, and the output."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from click.testing import CliRunner

from edgemix.cli import edgemix


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


class Distilled(msgspec.Struct):
    """The fields of a distillation's report."""

    parameters: int = 63_700_000
    layers: int = 10
    decoding: float | None = 0.294
    weights: dict[str, float] = msgspec.field(default_factory=lambda: {"a": 1.0})
    teacher_tokens: int = 400_000
    teacher_seconds: float = 899.6
    steps: int = 1000
    tokens: int = 2_048_000
    seconds: float = 1800.0
    training_loss: float = 1.25
    held_out_before: float | None = 2.5
    held_out: float | None = 1.5


def test_distill(library, recipe):
    recipe.write_text(
        "members:\n  - name: a\n    model: hub/id\nstudent: {steps: 9, alpha: 0.5}\n"
        f"data:\n  training:\n    law: {recipe.name}\n"
    )
    calls = library("edgemix.export.distillation.distill", "distill", Distilled())

    result = run("distill", recipe, "-o", "student", "--minutes", "45", "--bundle", "mixture")

    (built, output), options = calls[0]
    options.pop("progress")
    assert result.exit_code == 0
    assert (built.student.steps, built.student.minutes, built.student.alpha) == (9, 45.0, 0.5)
    assert output == Path("student")
    assert options == {"bundle": Path("mixture")}
    assert "10 layers, 63.7 M parameters" in result.stdout
    assert "about 29% of a member's time" in result.stdout
    assert "400,000 tokens, 900 s" in result.stdout
    assert "2.5000 before, 1.5000 after" in result.stdout
    output = json.loads(run("distill", recipe, "-o", "student", "--json").stdout)
    assert (output["student"], output["held_out"]) == ("student", 1.5)


def test_only_the_first_of_several_processes_prints(library, recipe, monkeypatch):
    """Regression: each process printed the report, so --json printed several documents."""
    library("edgemix.export.distillation.distill", "distill", Distilled())
    monkeypatch.setenv("RANK", "0")
    assert json.loads(run("distill", recipe, "-o", "student", "--json").stdout)["steps"] == 1000
    monkeypatch.setenv("RANK", "1")
    assert run("distill", recipe, "-o", "student", "--json").stdout == ""


def test_distill_interrupted(library, recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    library("edgemix.export.distillation.distill", "distill", KeyboardInterrupt())
    Path(".student.distilling").mkdir()

    result = run("distill", recipe, "-o", "student")

    assert result.exit_code == 130
    assert "run the same command to go on" in result.stderr
