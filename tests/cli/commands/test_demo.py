"""`demo`: the arguments that reach the library, and the output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix
from edgemix.results.evaluation import Evaluation, Figures, Row


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


@dataclass
class Sample:
    domain: str
    prompt: str
    text: str


@dataclass
class DemoReport:
    """The fields of a demo's report."""

    bundle: Path
    recipe: Path
    texts: dict[str, Path]
    evaluation: Evaluation
    samples: tuple[Sample, ...]
    seconds: float


@pytest.mark.parametrize(
    ("arguments", "folder"), [([], "edgemix-demo"), (["--tiny"], "edgemix-demo-tiny"), (["-o", "mine"], "mine")]
)
def test_demo(library, arguments, folder):
    figures = Figures(1000, 4000, 12.5, 1.125)
    row = Row("base", {"base": 1.0}, {"code": figures}, figures)
    report = DemoReport(
        bundle=Path(folder) / "bundle",
        recipe=Path(folder) / "recipe.yaml",
        texts={"code": Path(folder) / "code-test.jsonl"},
        evaluation=Evaluation((row,)),
        samples=(Sample("code", "def f(", "x): pass"),),
        seconds=59.6,
    )
    calls = library("edgemix.export.demo.run", "run_demo", report)

    result = run("demo", *arguments)

    positional, options = calls[0]
    assert result.exit_code == 0
    assert positional == (Path(folder),)
    assert options["tiny"] is ("--tiny" in arguments)
    assert "base   1.1250      1.1250" in result.stdout
    assert "A sample of code\ndef f(x): pass" in result.stdout
    assert f"Done in 60 s. The bundle: {folder}/bundle" in result.stdout
    assert json.loads(run("demo", *arguments, "--json").stdout)["seconds"] == 59.6
