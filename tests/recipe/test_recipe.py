"""Recipes: what they mean, and all their mistakes at once, each with its line."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest

from edgemix.errors import InputError, RecipeError
from edgemix.recipe import schema as recipe_module
from edgemix.recipe.compression import Quantization
from edgemix.recipe.load import check, load_recipe
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.template import template
from edgemix.recipe.text_sources import TextSource
from edgemix.recipe.validation import local_path

_WITH_STUDENT = "members: [{name: a, model: model}]\ndata: {training: [prose.txt]}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two texts, a model folder, an adapter and a GGUF file, as far as a recipe looks."""
    (tmp_path / "prose.txt").write_text("Some text.\n")
    (tmp_path / "math.jsonl").write_text('{"q": "1+1?", "a": "2"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path


def load(folder: Path, text: str | bytes) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return load_recipe(path)


def mistakes(folder: Path, text: str | bytes) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load(folder, text)
    return [line.strip().removeprefix("recipe.yaml:") for line in error.value.message.splitlines()[1:]]


def test_a_whole_recipe(folder: Path) -> None:
    recipe = load(
        folder,
        """
        members:
          - {name: base, model: model}
          - name: no
            model: ./model.gguf
            adapter: lora
            format: int4
          - name: 1.5
            model: organisation/name
        weights: {base: 1, no: 0.5, "1.5": 0}
        format: int8-dynamic
        data:
          validation:
            prose: prose.txt
          calibration:
            - {file: math.jsonl, template: "{q}\\n{a}"}
          window: 128
          max_tokens: 1_000
        seed: 7
        """,
    )
    assert recipe == Recipe(
        members=(
            MemberRecipe("base", "model"),
            MemberRecipe("no", "./model.gguf", "lora", "int4"),
            MemberRecipe("1.5", "organisation/name"),
        ),
        weights={"base": 1.0, "no": 0.5, "1.5": 0.0},
        format="int8-dynamic",
        data=Data(
            validation={"prose": TextSource("prose.txt")},
            calibration={"math": TextSource("math.jsonl", "{q}\n{a}")},
            window=128,
            max_tokens=1000,
        ),
        seed=7,
        folder=folder,
    )
    assert check(recipe) == []
    assert recipe.resolve("prose.txt") == folder / "prose.txt"


@pytest.mark.parametrize(("word", "value"), [("true", True), ("no", False), ("Off", False)])
def test_booleans(folder: Path, word: str, value: bool) -> None:
    """Any switch ended in a KeyError: nothing read true and false."""
    read = load(
        folder,
        f"""
        members: [{{name: a, model: model, quantization: {{rotate: {word}}}}}]
        student: {{eight_bit_optimizer: {word}}}
        data: {{training: [prose.txt]}}
        """,
    )
    assert read.student is not None
    assert read.members[0].quantization is not None
    assert (read.members[0].quantization.rotate, read.student.eight_bit_optimizer) == (value, value)


@pytest.mark.parametrize("value", ["1", "'true'", "maybe", "[true]", "''"])
def test_values_that_are_not_booleans(folder: Path, value: str) -> None:
    (told,) = mistakes(folder, f"members: [{{name: a, model: model}}]\nquantization: {{rotate: {value}}}")
    assert told.startswith("2: quantization.rotate: is ")
    assert told.endswith("; expected true or false")


def test_texts_as_a_list_are_domains_by_name(folder: Path) -> None:
    recipe = load(folder, "members: [{name: a, model: model}]\nweights: fit\ndata: {validation: [prose.txt]}")
    assert recipe.data.validation == {"prose": TextSource("prose.txt")}


def test_all_mistakes_are_reported_at_once_with_their_lines(folder: Path) -> None:
    (folder / "empty.txt").write_text(" \n")
    found = mistakes(
        folder,
        """\
        members:
          - name: base
            model: ./missing
            format: in8
          - nme: x
            model: prose.txt
          - name: Base
            model: organisation/name
            adapter: adapters/gone
          - just text
          - name: .hidden
            model: [1]
          - name: nothing
            model:
        weights: {base: -1, bse: .nan, Base: "3", Base: 2}
        target: cudaa
        data:
          validation: [prose.txt, empty.txt, gone/prose.txt]
          calibration:
            same: prose.txt
            bad: {file: math.jsonl, template: "{q.x}"}
          widnow: 3
          window: 1e3
        seed: -1
        folder: /etc
        """,
    )
    expected = [
        "3: members[0].model: there is no file or folder './missing'",
        "4: members[0].format: unknown value 'in8'; did you mean 'int8'?",
        "5: members[1].name: is missing",
        "5: members[1].nme: unknown key; did you mean 'name'?",
        "6: members[1].model: 'prose.txt' is neither",
        "7: members[2].name: 'Base' is also the name of members[0]",
        "9: members[2].adapter: there is no folder 'adapters/gone'",
        "10: members[3]: is 'just text'; expected a mapping with the keys name, model, adapter, format",
        "11: members[4].name: '.hidden' cannot name a folder",
        "12: members[4].model: is a list; expected text",
        "14: members[5].model: is empty; expected text",
        "15: weights.Base: is '3'; expected a number",
        "15: weights.Base: is there twice",
        "15: weights.base: is -1.0; it must be",
        "15: weights.bse: is nan; it must be",
        "16: target: unknown value 'cudaa'; did you mean 'cuda'?",
        "18: data.validation.empty: ",
        "18: data.validation.prose: is there twice",
        "20: data.calibration.same: is the same file as data.validation.prose",
        "21: data.calibration.bad: template",
        "22: data.widnow: unknown key; did you mean 'window'?",
        "23: data.window: is '1e3'; expected a whole number",
        "24: seed: is -1; it may be 0 to",
        "25: folder: unknown key",
    ]
    assert [told[: len(line)] for told, line in zip(found, expected, strict=True)] == expected


MEMBER = "members: [{name: a, model: model}, {name: b, model: model}]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: is empty"),
        ("# nothing\n", "1: is empty"),
        ("- a\n", "1: is a list; expected a mapping"),
        ("plain", "1: is 'plain'; expected a mapping"),
        ("\nmembers: []", "2: members: there are none"),
        ("format: int8", "1: members: is missing; expected a list"),
        ("a: [1\nb: 2", "2: is no YAML"),
        ("a:\n\tb: 1", "2: is no YAML"),
        ("a: 1\nb: \x07", "2: is no YAML: special characters are not allowed"),
        ("a: &x 1\nb: *x", "1: is no YAML: anchors"),
        ("a: 1\nb: *x", "2: is no YAML: anchors"),
        ("a: 1\n---\nb: 1", "2: is no YAML: expected a single document"),
        ("a: 1\nb: " + "[" * 1000, "2: is no YAML: it is nested too deep"),
        ("!!python/object:os.system {}", "1: the tag python/object:os.system is not used"),
        (MEMBER + "seed: !!int 3x", "2: seed: is '3x'; expected a whole number"),
        (MEMBER + "format: !mine int8", "2: format: the tag !mine is not used"),
        (MEMBER + "{a: 1}: 2", "1: line 2 has a key that is no text"),
        (MEMBER + "weights: [1]", "2: weights: is a list; expected one of uniform, fit, adaptive, fixed or a mapping"),
        (MEMBER + "weights: unifrom", "2: weights: unknown value 'unifrom'; did you mean 'uniform'?"),
        (MEMBER + "weights: {a: 0, b: 0}", "2: weights: are all zero"),
        (MEMBER + "weights: {a: 1}", "2: weights: has no weight for b"),
        (MEMBER + "weights: {}", "2: weights: has no weight for a, b"),
        (MEMBER + "weights: {a: 1, b: 1, c: 1}", "2: weights.c: no member has this name; "),
        (MEMBER + "weights: {a: 1, b: .inf}", "2: weights.b: is inf; it must be"),
        (MEMBER + "weights: {a: 1, b: 1e999}", "2: weights.b: is inf; it must be"),
        (MEMBER + "weights: {a: 1, b: yes}", "2: weights.b: is 'yes'; expected a number"),
        (MEMBER + "weights: fit", "2: weights: fit needs text"),
        (MEMBER + "format: int8-dynamic\ntarget: cuda", "2: format: int8-dynamic runs on the CPU only"),
        (MEMBER + "seed: 4294967296", "2: seed: is 4294967296; it may be 0 to 4294967295"),
        (MEMBER + "seed: " + "9" * 5000, "2: seed: is '9"),
        (MEMBER + "data: {max_tokens: 0}", "2: data.max_tokens: is 0"),
        (MEMBER + "data: {validation: prose.txt}", "2: data.validation: is 'prose.txt'; expected a mapping"),
        (MEMBER + "data: {validation: {a: {template: x}}}", "2: data.validation.a.file: is missing"),
        (MEMBER + 'data: {validation: ["pro\\0se"]}', "2: data.validation"),
        (MEMBER + "data: {validation: [gone.txt]}", "2: data.validation.gone: "),
        ("members: [{name: a/b, model: model}]", "1: members[0].name: 'a/b' cannot name a folder"),
        ("members: [{name: a., model: model}]", "1: members[0].name: 'a.' cannot name a folder"),
        ("members: [{name: é, model: model}]", "1: members[0].name: 'é' cannot name a folder"),
        (
            "members: [{name: Uniform, model: model}]",
            "1: members[0].name: 'Uniform' is the name of a mixture",
        ),
        (
            "members: [{name: student, model: model}]",
            "1: members[0].name: 'student' is the name of a mixture",
        ),
        ("members: [{name: a, model: gone.gguf}]", "1: members[0].model: there is no file or folder"),
        ("members: [{name: a, model: ~/gone/model}]", "1: members[0].model: there is no file or folder"),
        ("members: [{name: a, model: ~nobody-by-this-name}]", "1: members[0].model: there is no file"),
        ("members: [{name: a, model: a/b/c}]", "1: members[0].model: there is no file or folder"),
        ("members: [{name: a, model: lora}]", "1: members[0].model: 'lora' is neither a folder with a config.json"),
        ("members: [{name: a, model: model, adapter: model}]", "1: members[0].adapter: there is no folder 'model'"),
        (
            f"{_WITH_STUDENT}student: {{config: gone}}",
            "3: student.config: there is no folder 'gone' with a config.json",
        ),
        (
            f"{_WITH_STUDENT}student: {{config: lora}}",
            "3: student.config: there is no folder 'lora' with a config.json",
        ),
    ],
)
def test_one_mistake_is_reported_once(folder: Path, text: str, expected: str) -> None:
    (told,) = mistakes(folder, text)
    assert told.startswith(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"members: \xff", "not UTF-8: byte 0xff at offset 9"),
        (b"#" * ((1 << 20) + 1), "has more than 1,048,576 bytes"),
    ],
)
def test_files_that_are_not_recipes(folder: Path, text: bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(folder, text)


def test_missing_recipes(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe\n.*edgemix init"):
        load_recipe(folder / "missing.yaml")
    with pytest.raises(RecipeError, match="is no file"):
        load_recipe(folder / "model")


def test_hostile_recipes_end_soon(folder: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    started = time.monotonic()
    for text in (bomb, "a: " + "[" * 300_000, "- " * 200_000, "a: {b: " * 50_000):
        assert len(mistakes(folder, text)) == 1
    assert time.monotonic() - started < 5


def test_recipes_in_python_are_checked_alike(folder: Path) -> None:
    member = MemberRecipe("a", "model")
    assert check(Recipe((member,), folder=folder)) == []
    assert check(Recipe((member, member), folder=folder)) == [
        "members[1].name: 'a' is also the name of members[0]; choose another"
    ]
    for weights in ("fit", "adaptive", "fixed"):
        assert check(Recipe((member,), weights=weights, folder=folder))[0].startswith(f"weights: {weights} needs text")
    assert check(Recipe((member,), format="int3", folder=folder)) == ["Invalid enum value 'int3' - at `$.format`"]  # type: ignore[arg-type]
    assert "`$.seed`" in check(Recipe((member,), seed="0", folder=folder))[0]  # type: ignore[arg-type]


def test_existing_paths_come_before_hub_ids(folder: Path) -> None:
    assert local_path("model", folder) == folder / "model"
    assert local_path(str(folder / "model"), Path()) == folder / "model"
    assert local_path("gpt2", folder) is None
    assert local_path("HuggingFaceTB/SmolLM2-135M", folder) is None
    for name in ("./gpt2", "/gpt2", "a/b/c", "x.gguf", "a b", "../gone", "x" * 100, "x" * 5000):
        with pytest.raises(InputError, match="no file or folder"):
            local_path(name, folder)


def test_the_template_is_valid_but_for_missing_files(folder: Path) -> None:
    (told,) = mistakes(folder, template())
    assert "adapters/math" in told
    assert [member.model for member in load(folder, template("model", "organisation/name")).members] == [
        "model",
        "organisation/name",
    ]
    (told,) = mistakes(folder, template('odd: "path" #1/model'))
    assert "there is no file or folder 'odd: \"path\" #1/model'" in told


def test_commented_out_parts_of_the_template_are_valid(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/prose.txt").write_text("text")
    (folder / "data/math.jsonl").write_text('{"question": "1+1", "answer": 2}')
    (folder / "data/math-train.jsonl").write_text('{"question": "2+2", "answer": 4}')
    (folder / "data/prose-train.txt").write_text("other text")
    text = template("model")
    start = text.index("# data:")
    data = "\n".join(line.removeprefix("# ") for line in text[start:].splitlines())
    recipe = load(folder, text[:start] + data)
    assert recipe.data.validation["math"].template == "Question: {question}\nAnswer: {answer}\n"
    assert recipe_module.Data().window == recipe.data.window
    assert recipe_module.Data().max_tokens == recipe.data.max_tokens


def test_the_old_name_of_learned_rounding_is_accepted(folder: Path) -> None:
    assert Quantization("distil") == Quantization("learned-rounding")
    (folder / "own.txt").write_text("text")
    recipe = load(
        folder,
        "members: [{name: a, model: hub/id}]\nquantization: {algorithm: distil}\ndata: {calibration: {x: own.txt}}\n",
    )
    assert recipe.quantization.algorithm == "learned-rounding"
