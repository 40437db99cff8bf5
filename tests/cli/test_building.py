"""`export`, `finetune` and `demo`: what they hand to the library, and what they print of its answer."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from click.testing import CliRunner

from edgemix.bundle.manifest import BudgetFigures, BudgetPoint, MixtureParity, QuantizationParity
from edgemix.bundle.reader import read_manifest
from edgemix.cli import edgemix
from edgemix.results.evaluation import Evaluation, Figures, Row


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


@pytest.fixture
def library(monkeypatch):
    """Put a function in the place of one of the library's; what it was called with is in `calls`."""
    calls: list[tuple[tuple, dict]] = []

    def replace(module: str, name: str, answer: object) -> list[tuple[tuple, dict]]:
        def function(*arguments, **options):
            calls.append((arguments, options))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: function}))
        return calls

    return replace


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("members:\n  - name: a\n    model: hub/id\n")
    return path


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
    told = json.loads(run("export", recipe, "-o", "out", "--json").stdout)
    assert told["members"][0]["quantization"]["kl"] == 0.01234


def test_export_within_a_budget(library, recipe, bundle):
    from edgemix.export.budget.plan import Budget

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
    assert calls[0][1]["budget"] == Budget(200_000_000, 0.02)
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
    assert [options["budget"] for _, options in calls[2:]] == [Budget(None, 0.02), None]


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
def test_no_budget(library, recipe, option, value, message):
    calls = library("edgemix.export.pipeline", "export_bundle", None)

    result = run("export", recipe, "-o", "out", option, value)

    assert (result.exit_code, calls) == (2, [])
    assert f"error: Invalid value for '{option}': " in result.stderr
    assert message in result.stderr


def test_export_interrupted(library, recipe):
    library("edgemix.export.pipeline", "export_bundle", KeyboardInterrupt())

    result = run("export", recipe, "-o", "out")

    assert result.exit_code == 130
    assert "interrupted\nNo bundle was written, but finished stages are kept" in result.stderr


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
def test_finetune_that_makes_no_sense(arguments, message):
    result = run("finetune", *arguments, "-o", "law")

    assert result.exit_code == 2
    assert message in result.stderr


def test_finetune_without_text(library, tmp_path):
    result = run("finetune", "base", tmp_path / "missing.txt", "-o", "law")

    assert result.exit_code == 2
    assert "missing.txt: no such file" in result.stderr


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
    calls = library("edgemix.export.distillation.distill", "distil", Distilled())

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
    told = json.loads(run("distill", recipe, "-o", "student", "--json").stdout)
    assert (told["student"], told["held_out"]) == ("student", 1.5)


def test_of_several_processes_that_distil_one_tells(library, recipe, monkeypatch):
    """Each printed the report, so that --json was as many documents."""
    library("edgemix.export.distillation.distill", "distil", Distilled())
    monkeypatch.setenv("RANK", "0")
    assert json.loads(run("distill", recipe, "-o", "student", "--json").stdout)["steps"] == 1000
    monkeypatch.setenv("RANK", "1")
    assert run("distill", recipe, "-o", "student", "--json").stdout == ""


def test_distill_interrupted(library, recipe):
    library("edgemix.export.distillation.distill", "distil", KeyboardInterrupt())

    result = run("distill", recipe, "-o", "student")

    assert result.exit_code == 130
    assert "run the same command to go on" in result.stderr


@pytest.mark.parametrize(
    "command",
    [("finetune", "RECIPE"), ("finetune", "base", "RECIPE"), ("distill", "RECIPE"),
     ("prune", "base", "--text", "RECIPE", "--ffn", "0.5")],
)  # fmt: skip
def test_a_place_that_is_taken_is_told_at_once(recipe, command):
    """It was told after torch had been imported, many seconds later."""
    result = run(*(recipe if word == "RECIPE" else word for word in command), "-o", recipe.parent)

    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert "import torch" not in result.stderr
