"""Bounds of numbers, which recipes and the command line read from the same place."""

import math

import click
import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix
from edgemix.errors import InputError
from edgemix.recipe.bounds import bound_problems, bounds_of
from edgemix.recipe.compression import Pruning, Quantization, Student
from edgemix.recipe.load import check
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.runtime.options import Settings


def test_every_number_out_of_bounds_is_found_at_once():
    recipe = Recipe(
        members=(MemberRecipe("a", "a", prune=Pruning(layers=0.96, steps=0)),),
        quantization=Quantization(eight_bits=math.nan),
        student=Student(skew=1.0, minutes=0.0, learning_rate=11.0, steps=None),
        data=Data(window=1),
        seed=-1,
    )
    expected = [
        "members[0].prune.layers: is 0.96; it may be 0 to 0.95",
        "members[0].prune.steps: is 0; it may be 1 to 100",
        "quantization.eight_bits: is nan; it may be 0 to 1",
        "student.skew: is 1.0; it may be a number between 0 and 1",
        "student.minutes: is 0.0; it may be any number above 0",
        "student.learning_rate: is 11.0; it may be a number above 0, up to 10",
        "data.window: is 1; it may be 2 to 1048576",
        "seed: is -1; it may be 0 to 4294967295",
    ]
    assert [str(problem) for problem in bound_problems(recipe)] == expected
    assert set(expected) <= set(check(recipe))


@pytest.mark.parametrize(
    ("command", "option", "part", "field"),
    [
        ("prune", "--layers", Pruning, "layers"),
        ("prune", "--steps", Pruning, "steps"),
        ("prune", "--recover", Pruning, "recover"),
        ("prune", "--seed", Recipe, "seed"),
        ("finetune", "--learning-rate", Student, "learning_rate"),
        ("evaluate", "--window", Data, "window"),
    ],
)
def test_options_have_the_bounds_of_the_recipe(command, option, part, field):
    parameters = edgemix.get_command(click.Context(edgemix), command).params
    found = next(parameter.type for parameter in parameters if option in parameter.opts)
    _, bounds = bounds_of(part, field)
    limits = (found.min, found.max, found.min_open, found.max_open)
    assert limits == (bounds.gt if bounds.ge is None else bounds.ge, bounds.le, bounds.gt is not None, False)


def test_an_option_out_of_bounds_is_a_usage_error():
    result = CliRunner().invoke(edgemix, ["prune", "model", "-o", "x", "--text", "t", "--ffn", "2"])
    assert result.exit_code == 2
    assert "0<=x<=0.95" in result.stderr


def test_numbers_without_end_are_refused_in_few_words():
    """Whole numbers beyond floats raised an OverflowError, and beyond 4,300 digits a ValueError."""
    for number, text in ((10**400, "about 10^400"), (-(10**5000), "about -10^5000"), (2**32, "4294967296")):
        (problem,) = bound_problems(Recipe((), seed=number))
        assert str(problem) == f"seed: is {text}; it may be 0 to 4294967295"
    member = MemberRecipe("a", "m")
    assert check(Recipe((member,), {"a": 10**400})) == ["Number out of range - at `$.weights[...]`"]
    for name in ("temperature", "top_p", "repetition_penalty"):
        with pytest.raises(InputError, match=rf"{name} must be .*about 10\^5000"):
            Settings.of(**{name: 10**5000})
