"""Options: invalid values are refused with the option's name, before a bundle is loaded."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix
from edgemix.cli.options import DURATION, SIZE, WeightsType, sampling_options


def run(*arguments: str, **settings):
    return CliRunner().invoke(edgemix, list(arguments), **settings)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "hot"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--min-p", "-1"),
        ("--top-k", "-1"),
        ("--repetition-penalty", "0"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "1.5"),
        ("--threads", "0"),
        ("--seed", "-1"),
        ("--provider", "tpu"),
        ("--combine", "median"),
        ("--weights", "math=x"),
        ("--weights", "math=nan"),
        ("--weights", "math=-1,code=2"),
        ("--weights", "math=0,code=0"),
        ("--weights", "math=1,math=2"),
        ("--weights", "math=1,code"),
        ("--weights", "=1"),
        ("--weights", " "),
    ],
)
def test_invalid_values_are_usage_errors(option, value):
    result = run("generate", "no-such-bundle", "hello", option, value)

    assert result.exit_code == 2
    assert result.stderr.startswith("error: Invalid value for ")
    assert option in result.stderr


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("math=0.7,code=0.3", {"math": 0.7, "code": 0.3}),
        (" math = 2 , code = 1 ", {"math": 2.0, "code": 1.0}),
        ("math=1", {"math": 1.0}),
        ("math", "math"),
    ],
)
def test_weights(text, weights):
    assert WeightsType().convert(text, None, None) == weights


@pytest.mark.parametrize(
    ("kind", "text", "number"),
    [
        (SIZE, "250MB", 250e6),
        (SIZE, "0.2 GB", 2e8),
        (SIZE, "95e6", 95e6),
        (SIZE, " 200 MiB ", 200 * 2**20),
        (SIZE, "1.5e3kb", 1.5e6),
        (SIZE, "4096 B", 4096),
        (DURATION, "20ms", 0.02),
        (DURATION, "0.02s", 0.02),
        (DURATION, ".5 MS", 0.0005),
    ],
)
def test_quantities(kind, text, number):
    assert kind.convert(text, None, None) == pytest.approx(number)
    assert kind.convert(kind.convert(text, None, None), None, None) == pytest.approx(number)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (SIZE, "big", "'big' is not a size like 250MB"),
        (SIZE, "", "'' is not a size"),
        (SIZE, "1 2MB", "is not a size"),
        (SIZE, "nan", "is not a size"),
        (SIZE, "250MBit", "unknown unit 'MBit'; write it like 250MB"),
        (SIZE, "20ms", "unknown unit 'ms'"),
        (SIZE, "-1MB", "is not above zero"),
        (SIZE, "0", "is not above zero"),
        (SIZE, "1e400", "is not above zero and finite"),
        (DURATION, "20", "'20' has no unit; write it like 20ms"),
        (DURATION, "20MB", "unknown unit 'MB'"),
    ],
)
def test_invalid_quantities(kind, text, message):
    with pytest.raises(click.BadParameter, match=message):
        kind.convert(text, None, None)


def test_a_typed_line_end_in_a_template():
    @click.command()
    @click.pass_context
    def show(context, template):
        click.echo(template, nl=False)

    from edgemix.cli.options import template_option

    result = CliRunner().invoke(template_option(show), ["--template", r"Q: {q}\nA: {a}\n"])

    assert result.output == "Q: {q}\nA: {a}\n"


def test_a_stop_string_may_be_a_line_end():
    r"""Shells pass \n as two characters, which stopped nothing; --template knew it."""

    @click.command()
    @sampling_options(8)
    def show(stop: tuple[str, ...], **_: object) -> None:
        click.echo(repr(stop))

    result = CliRunner().invoke(show, ["--stop", "\\n\\n", "--stop", "x"])
    assert result.output == "('\\n\\n', 'x')\n"
