"""Options and arguments that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from edgemix.cli.texts import unescape_newlines

F = TypeVar("F", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A finite number within limits; click's own type accepts NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class _BoundedOption(click.Option):
    """An option with the bounds of a recipe's number.

    They are read when a value or the command's help needs them: `edgemix --help` must not import msgspec.

    Args:
        field: The recipe's part and the number in it, such as "Pruning.layers".
    """

    def __init__(self, *args: Any, field: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._field = field
        del self.type

    def __getattr__(self, name: str) -> Any:
        if name != "type":
            raise AttributeError(name)
        from edgemix.recipe import schema
        from edgemix.recipe.bounds import bounds_of

        part, _, field = self._field.partition(".")
        kind, bounds = bounds_of(getattr(schema, part), field)
        low, high = (bounds.gt if bounds.ge is None else bounds.ge), (bounds.lt if bounds.le is None else bounds.le)
        number = click.IntRange if kind is int else Number
        self.type = number(low, high, min_open=bounds.gt is not None, max_open=bounds.lt is not None)
        return self.type


bounded_option = partial(click.option, cls=_BoundedOption)


class Quantity(click.ParamType):
    """A number above zero with a unit, converted to the base unit: `SIZE` converts `250MB` to 2.5e8.

    Args:
        name: What is measured, for messages.
        units: Unit in lower case -> factor; "" is a number without a unit, if that is allowed.
        example: A valid value, for messages.
    """

    def __init__(self, name: str, units: Mapping[str, float], example: str) -> None:
        self.name, self._units, self._example = name, units, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):  # already converted: click may call twice
            return value
        match = _QUANTITY.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a {self.name} like {self._example}.", param, ctx)
        unit = match["unit"].lower()
        if unit not in self._units:
            problem = f"has the unknown unit {match['unit']!r}" if unit else "has no unit"
            self.fail(f"{value!r} {problem}; write it like {self._example}.", param, ctx)
        number = float(match["number"]) * self._units[unit]
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is not above zero and finite.", param, ctx)
        return number


_QUANTITY = re.compile(r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-z]*)\s*")

SIZE = Quantity(
    "size",
    {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    example="250MB (0.25 GB, 240 MiB, or 250e6 bytes)",
)
DURATION = Quantity("duration", {"ms": 1e-3, "s": 1.0}, example="20ms (or 0.02s)")


class WeightsType(click.ParamType):
    """Weights: a mapping from `math=0.7,code=0.3`, or the name of a domain unchanged."""

    name = "weights"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float] | str:
        if isinstance(value, dict):  # already converted: click may call twice
            return value
        if "=" not in value:
            return str(value).strip() or self.fail("is empty.", param, ctx)
        weights: dict[str, float] = {}
        for part in value.split(","):
            name, equals, number = (piece.strip() for piece in part.partition("="))
            if not name or not equals or not number:
                self.fail(f"{part.strip()!r} is not NAME=NUMBER.", param, ctx)
            if name in weights:
                self.fail(f"{name!r} is given twice.", param, ctx)
            weights[name] = Number(min=0).convert(number, param, ctx)
        if not any(weights.values()):
            self.fail("the weights are all zero.", param, ctx)
        return weights


def bundle_argument(function: F) -> F:
    return click.argument("bundle", type=click.Path(path_type=Path))(function)


def runtime_options(function: F) -> F:
    """Add the options for loading a bundle: --provider, --threads, --no-verify."""
    return _all(
        function,
        (
            click.option(
                "--provider",
                type=click.Choice(["auto", "cpu", "cuda", "cuda-graphs"]),
                default="auto",
                show_default=True,
                help="Execution provider; auto is CUDA if it works here.",
            ),
            click.option(
                "--threads",
                metavar="N",
                type=click.IntRange(min=1),
                show_default="all cores",
                help="CPU threads.",
            ),
            click.option(
                "--no-verify",
                "verify",
                flag_value=False,
                default=True,
                help="Skip the checksums; only for a bundle that you trust.",
            ),
        ),
    )


def weights_option(function: F) -> F:
    return click.option(
        "--weights",
        metavar="TEXT",
        type=WeightsType(),
        show_default="the bundle's",
        help='"adaptive" (follow the text), "fixed" (the bundle\'s), a fitted domain, or like "math=0.7,code=0.3".',
    )(function)


def mixing_options(function: F) -> F:
    """Add the options for mixing: --student, --weights, --combine."""
    return _all(
        function,
        (
            click.option(
                "--student",
                is_flag=True,
                help="Use the student alone, without the members: faster, less memory.",
            ),
            weights_option,
            click.option(
                "--combine",
                type=click.Choice(["linear", "log-linear"]),
                default="linear",
                show_default=True,
                help="Average the members' probabilities, or their logarithms.",
            ),
        ),
    )


def check_student(student: bool, weights: object) -> None:
    """Raise click.UsageError if both --student and --weights are given."""
    if student and weights is not None:
        raise click.UsageError("--weights mixes the members, and --student leaves them out: give only one.")


_SAMPLER_OPTIONS = (
    click.option(
        "--temperature",
        metavar="X",
        type=Number(min=0),
        default=0.0,
        show_default=True,
        help="0 is greedy; 1 samples from the mixture's distribution.",
    ),
    click.option(
        "--top-k",
        metavar="N",
        type=click.IntRange(min=0),
        default=0,
        show_default="all",
        help="Sample from the N most probable tokens.",
    ),
    click.option(
        "--top-p",
        metavar="X",
        type=Number(min=0, max=1, min_open=True),
        default=1.0,
        show_default=True,
        help="Sample from the most probable tokens whose probabilities sum to X.",
    ),
    click.option(
        "--min-p",
        metavar="X",
        type=Number(min=0, max=1),
        default=0.0,
        show_default=True,
        help="Drop tokens with less than X times the highest probability.",
    ),
    click.option(
        "--repetition-penalty",
        metavar="X",
        type=Number(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Above 1, tokens that occurred before become less probable.",
    ),
)
"""The options that shape the distribution that a token is sampled from."""


def sampling_options(max_new_tokens: int) -> Callable[[F], F]:
    """Add the options for sampling and stopping; `max_new_tokens` is the default length."""
    return partial(
        _all,
        options=(
            click.option(
                "-n",
                "--max-new-tokens",
                metavar="N",
                type=click.IntRange(min=1),
                default=max_new_tokens,
                show_default=True,
                help="Stop after N tokens.",
            ),
            *_SAMPLER_OPTIONS,
            click.option(
                "--stop",
                multiple=True,
                metavar="TEXT",
                callback=_unescape_newlines,
                help="Stop before this text, \\n for a line end; may be repeated.",
            ),
            click.option(
                "--seed", metavar="N", type=click.IntRange(min=0), help="Seed of the sampling, for repeatable texts."
            ),
            click.option(
                "--speculation",
                type=click.Choice(["auto", "lookup", "student", "off"]),
                default="auto",
                show_default=True,
                help="Where speculative decoding takes its drafts from; the text does not change.",
            ),
        ),
    )


def constraint_options(function: F) -> F:
    """Add the options that constrain the text: --json-schema, --regex, --choice."""
    return _all(
        function,
        (
            click.option(
                "--json-schema",
                metavar="FILE",
                type=click.Path(path_type=Path),
                help="The text is JSON that matches the schema in FILE.",
            ),
            click.option("--regex", metavar="TEXT", help="The whole text matches this regular expression."),
            click.option(
                "--choice",
                "choices",
                metavar="TEXT",
                multiple=True,
                callback=lambda ctx, param, value: value or None,  # noqa: ARG005
                help="The text is one of the choices; may be repeated.",
            ),
        ),
    )


def template_option(function: F) -> F:
    return click.option(
        "--template",
        metavar="TEXT",
        callback=_unescape_newlines,
        show_default="the line's text field",
        help='Makes text from a line of a .jsonl file, like "Q: {question}\\nA: {answer}".',
    )(function)


def window_option(function: F) -> F:
    return bounded_option(
        "--window",
        metavar="N",
        field="Data.window",
        default=512,
        show_default=True,
        help="Tokens per chunk of text; each chunk is scored without those before it. At most the context.",
    )(function)


def max_tokens_option(function: F) -> F:
    return bounded_option(
        "--max-tokens",
        metavar="N",
        field="Data.max_tokens",
        show_default="all",
        help="Use only the first N tokens of each file.",
    )(function)


def training_limit_options(*, steps: str, minutes: str) -> Callable[[F], F]:
    """Add --steps and --minutes; the arguments are their defaults, for the help."""
    return partial(
        _all,
        options=(
            bounded_option(
                "--steps", metavar="N", field="Student.steps", show_default=steps, help="Stop after N optimizer steps."
            ),
            bounded_option(
                "--minutes",
                metavar="X",
                field="Student.minutes",
                show_default=minutes,
                help="Stop after X minutes, including the time before an interruption.",
            ),
        ),
    )


def seed_option(help_text: str) -> Callable[[F], F]:
    """Add --seed, for training."""
    return bounded_option("--seed", metavar="N", field="Recipe.seed", default=0, show_default=True, help=help_text)


def _unescape_newlines(ctx: click.Context, param: click.Parameter, value: Any) -> Any:  # noqa: ARG001
    return tuple(map(unescape_newlines, value)) if isinstance(value, tuple) else unescape_newlines(value)


def _all(function: F, options: Sequence[Callable[[F], F]]) -> F:
    """Apply options so that the help lists them in the given order."""
    for option in reversed(options):
        function = option(function)
    return function
