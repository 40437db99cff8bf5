"""`edgemix lm-eval`: lm-evaluation-harness's own command line, with bundles among its models."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from edgemix.cli.command import command
from edgemix.cli.failures import DEBUG
from edgemix.errors import EdgemixError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemix.cli.console import Console


@command(
    "lm-eval",
    example="edgemix lm-eval run --model edgemix --model_args bundle=mixture \\\n"
    "    --tasks hellaswag,gsm8k\n"
    "edgemix lm-eval run --model edgemix \\\n"
    '    --model_args "bundle=mixture,weights=math:0.5;code:0.5" --tasks gsm8k\n'
    "edgemix lm-eval --json run --model edgemix --tasks my_task \\\n"
    "    --include_path tasks --model_args bundle=mixture,student=true\n"
    "edgemix lm-eval run --help",
    extra="cpu,lm-eval",
    kept="What --use_cache names is kept, and nothing else.",
)
@click.argument("arguments", metavar="run|ls|validate ...", nargs=-1, required=True, type=click.UNPROCESSED)
def lm_eval(console: Console, *, arguments: tuple[str, ...]) -> None:
    """Run EleutherAI's lm-evaluation-harness on bundles.

    From `run` on, everything is the harness's own command line, which knows the model `edgemix`. Its model_args are
    bundle=FOLDER, weights=DOMAIN, weights=adaptive or "weights=math:0.5;code:0.5", combine=log-linear, student=true,
    provider=cpu, threads=N and max_length=N. With --json, which comes first, the results are one JSON document.
    """
    if console.as_json:
        check_json(arguments)

    import lm_eval.evaluator  # noqa: F401 - all that the extra brings is there, or named
    from lm_eval.__main__ import cli_evaluate

    from edgemix.cli.lm_eval import model  # noqa: F401 - registers the model

    with TemporaryDirectory() as folder, harness_failures():
        with program("lm-eval", *arguments, *(("--output_path", folder) if console.as_json else ())):
            cli_evaluate()
        if console.as_json:
            console.document(read_results(Path(folder)))


lm_eval.allow_interspersed_args = False  # what follows `run` is not for click


def check_json(arguments: tuple[str, ...]) -> None:
    """Raise click.UsageError where results cannot be printed as JSON: they are read from where it puts them."""
    if arguments[0] != "run":
        raise click.UsageError(f"--json prints the results of `run`, and {arguments[0]!r} has none.")
    if any(argument.startswith(("--o", "-o")) for argument in arguments):
        raise click.UsageError("--json prints what --output_path would write: give one of the two.")


def read_results(folder: Path) -> object:
    """What the harness wrote."""
    for path in folder.rglob("results_*.json"):
        return json.loads(path.read_bytes())  # with NaN, which the standard does not know
    raise EdgemixError("lm-evaluation-harness ended without results")


@contextmanager
def program(*arguments: str) -> Iterator[None]:
    """Let the process's arguments be these, for a library that reads them there."""
    own, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = own


@contextmanager
def harness_failures() -> Iterator[None]:
    """Report what the harness raises as its failure, not as a bug of edgemix."""
    try:
        yield
    except EdgemixError:
        raise
    except Exception as error:
        message = error.args[0] if error.args and isinstance(error.args[0], str) else repr(error)
        raise EdgemixError(f"lm-evaluation-harness: {message}", f"{DEBUG}=1 shows where it happened.") from error
