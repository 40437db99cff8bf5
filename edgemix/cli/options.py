"""Options and arguments that several commands share, each defined once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from edgemix.cli.texts import with_line_ends

F = TypeVar("F", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A finite number within limits (click alone lets `nan` through)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Quantity(click.ParamType):
    """A number above zero with a unit, in the unit whose factor is 1: `Quantity("size", ...)` makes 2.5e8 of `250MB`.

    Args:
        name: Of what is measured.
        units: Unit in lower case -> factor; "" is a number alone, if that may be.
        example: For messages.
    """

    def __init__(self, name: str, units: Mapping[str, float], example: str) -> None:
        self.name, self._units, self._example = name, units, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):  # already converted: click may ask twice
            return value
        match = _QUANTITY.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is no {self.name} like {self._example}.", param, ctx)
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
    """`math=0.7,code=0.3` as a mapping, or the name of a domain as it is."""

    name = "weights"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float] | str:
        if isinstance(value, dict):  # already converted: click may ask twice
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
    """How a bundle is loaded: --provider, --threads, --no-verify."""
    return _all(
        function,
        (
            click.option(
                "--provider",
                type=click.Choice(["auto", "cpu", "cuda", "cuda-graphs"]),
                default="auto",
                show_default=True,
                help="Where the members run; auto takes CUDA when it works.",
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
                help="Skip the checksums, which a large bundle that you trust may not need.",
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
    """Who speaks, and how the members are mixed: --student, --weights, --combine."""
    return _all(
        function,
        (
            click.option(
                "--student",
                is_flag=True,
                help="Use the student alone: faster, and in less memory; the members are not loaded.",
            ),
            weights_option,
            click.option(
                "--combine",
                type=click.Choice(["linear", "log-linear"]),
                default="linear",
                show_default=True,
                help="Average probabilities, or their logarithms.",
            ),
        ),
    )


def check_student(student: bool, weights: object) -> None:
    """Raise click.UsageError if weights are given for the student, which is one model."""
    if student and weights is not None:
        raise click.UsageError("--weights mixes the members, and --student leaves them out: give one of the two.")


def sampling_options(max_new_tokens: int) -> Callable[[F], F]:
    """How the next token is chosen and when to stop; `max_new_tokens` is the default length."""
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
                help="Stop after so many tokens.",
            ),
            click.option(
                "--temperature",
                metavar="X",
                type=Number(min=0),
                default=0.0,
                show_default=True,
                help="0 takes the most probable token; 1 samples as the mixture says.",
            ),
            click.option(
                "--top-k",
                metavar="N",
                type=click.IntRange(min=0),
                default=0,
                show_default="all",
                help="Sample from the N best tokens.",
            ),
            click.option(
                "--top-p",
                metavar="X",
                type=Number(min=0, max=1, min_open=True),
                default=1.0,
                show_default=True,
                help="Sample from the best tokens that hold this probability together.",
            ),
            click.option(
                "--min-p",
                metavar="X",
                type=Number(min=0, max=1),
                default=0.0,
                show_default=True,
                help="Drop tokens below this share of the best one's probability.",
            ),
            click.option(
                "--repetition-penalty",
                metavar="X",
                type=Number(min=0, min_open=True),
                default=1.0,
                show_default=True,
                help="Above 1, tokens seen before become less probable.",
            ),
            click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
            click.option("--seed", metavar="N", type=click.IntRange(min=0), help="Makes sampling repeatable."),
            click.option(
                "--speculation",
                type=click.Choice(["auto", "lookup", "student", "off"]),
                default="auto",
                show_default=True,
                help="Where drafts that the mixture verifies come from; the text is the same.",
            ),
        ),
    )


def form_options(function: F) -> F:
    """What the text must be: --json-schema, --regex, --choice."""
    return _all(
        function,
        (
            click.option(
                "--json-schema",
                metavar="FILE",
                type=click.Path(path_type=Path),
                help="The text is JSON that follows the schema in this file.",
            ),
            click.option("--regex", metavar="TEXT", help="The whole text matches this regular expression."),
            click.option(
                "--choice",
                "choices",
                metavar="TEXT",
                multiple=True,
                callback=lambda ctx, param, value: value or None,  # noqa: ARG005
                help="The text is this one or another choice; may be repeated.",
            ),
        ),
    )


def template_option(function: F) -> F:
    return click.option(
        "--template",
        metavar="TEXT",
        callback=_with_line_ends,
        show_default="the line's text field",
        help='How a line of a .jsonl file becomes text, like "Q: {question}\\nA: {answer}".',
    )(function)


def window_option(function: F) -> F:
    return click.option(
        "--window",
        metavar="N",
        type=click.IntRange(min=2),
        default=512,
        show_default=True,
        help="Tokens that are read with one past; at most the context.",
    )(function)


def max_tokens_option(function: F) -> F:
    return click.option(
        "--max-tokens",
        metavar="N",
        type=click.IntRange(min=2),
        show_default="all",
        help="Tokens to use of each file, from its beginning.",
    )(function)


def _with_line_ends(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001
    return with_line_ends(value)


def _all(function: F, options: Sequence[Callable[[F], F]]) -> F:
    """Apply options so that the help shows them in the order given."""
    for option in reversed(options):
        function = option(function)
    return function
