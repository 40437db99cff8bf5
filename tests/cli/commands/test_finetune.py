"""`finetune`: the arguments that reach the library, and the output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


@dataclass
class Report:
    """The fields of a fine-tuning's report."""

    adapter: Path = Path("law")
    steps: int = 12
    tokens: int = 24_576
    seconds: float = 61.0
    parameters: int = 4_900_000
    training_loss: float = 2.5
    validation_before: float | None = 3.0
    validation_after: float | None = 2.75


@dataclass
class TunedMember:
    """The fields of a member's report."""

    name: str = "a"
    adapter: Path = Path("tuned/a")
    parameters: int = 100
    weight: float = 1.0
    validation_before: float | None = 3.0
    validation_after: float | None = 2.5


@dataclass
class TunedMixture:
    """The fields of a joint fine-tuning's report."""

    recipe: Path = Path("tuned/recipe.yaml")
    joint: bool = True
    members: tuple[TunedMember, ...] = (TunedMember(),)
    steps: int = 12
    tokens: int = 24_576
    seconds: float = 61.0
    training_loss: float = 2.5
    validation_before: float | None = 2.75
    validation_after: float | None = 2.25


def test_finetune(library, tmp_path):
    calls = library("edgemix.export.finetuning.finetune", "finetune", Report())
    (tmp_path / "law.txt").write_text("one")
    (tmp_path / "acts.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')

    texts = [tmp_path / "law.txt", tmp_path / "acts.jsonl"]
    result = run("finetune", "base", *texts, "-o", "law", "--minutes", "1.5", "--rank", "8")

    arguments, options = calls[0]
    options.pop("progress")
    assert result.exit_code == 0
    assert arguments == ("base", Path("law"), ["one", "two", "three"])
    assert options == {
        "four_bit": False,
        "rank": 8,
        "steps": None,
        "minutes": 1.5,
        "batch": 8,
        "length": 256,
        "learning_rate": 5e-4,
        "seed": 0,
    }
    assert "12 steps, 24,576 tokens, 61 s" in result.stdout
    assert "3.0000 before, 2.7500 after" in result.stdout
    assert json.loads(run("finetune", "base", *texts, "-o", "law", "--json").stdout)["steps"] == 12


def test_finetune_of_a_recipe(library, recipe, tmp_path):
    calls = library("edgemix.export.finetuning.joint", "finetune_mixture", TunedMixture())
    (tmp_path / "law.txt").write_text("one")

    result = run("finetune", recipe, "-o", "tuned", "--qlora", "--separate", "--steps", "12")
    run("finetune", recipe, tmp_path / "law.txt", "-o", "tuned")

    ((built, output, texts), options), ((_, _, given), _) = calls
    assert result.exit_code == 0
    assert [member.name for member in built.members] == ["a"]
    assert (output, texts, given) == (Path("tuned"), None, {"law": ["one"]})
    assert (options["four_bit"], options["separate"], options["steps"]) == (True, True, 12)
    assert "fine-tuned jointly" in result.stdout
    assert "mixture                          2.7500   2.2500" in result.stdout
    assert "Next: edgemix export tuned/recipe.yaml" in result.stdout
    assert json.loads(run("finetune", recipe, "-o", "tuned", "--json").stdout)["members"][0]["weight"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "Missing argument 'TEXT...'"),
        (["base", "law.txt", "--separate"], "--separate is for recipes"),
        (["recipe.yml"], "there is no such recipe"),
    ],
)
def test_finetune_usage_errors(arguments, message):
    result = run("finetune", *arguments, "-o", "law")

    assert result.exit_code == 2
    assert message in result.stderr


def test_finetune_without_text(library, tmp_path):
    result = run("finetune", "base", tmp_path / "missing.txt", "-o", "law")

    assert result.exit_code == 2
    assert "missing.txt: no such file" in result.stderr


@pytest.mark.parametrize(
    "command",
    [("finetune", "RECIPE"), ("finetune", "base", "RECIPE"), ("distill", "RECIPE"),
     ("prune", "base", "--text", "RECIPE", "--ffn", "0.5")],
)  # fmt: skip
def test_an_existing_output_is_refused_before_torch_is_imported(recipe, command):
    """Regression: it was refused after torch had been imported, many seconds later."""
    result = run(*(recipe if word == "RECIPE" else word for word in command), "-o", recipe.parent)

    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert "import torch" not in result.stderr
