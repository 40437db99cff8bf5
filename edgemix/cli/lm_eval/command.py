"""`edgemix lm-eval`: the command line of lm-evaluation-harness, with bundles as models."""

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
    on_interrupt="Only the cache that --use_cache names is kept.",
)
@click.argument("arguments", metavar="run|ls|validate ...", nargs=-1, required=True, type=click.UNPROCESSED)
def lm_eval(console: Console, *, arguments: tuple[str, ...]) -> None:
    """Run EleutherAI's lm-evaluation-harness on bundles.

    All arguments from `run` on are those of the harness's own command line, which gets a model named `edgemix`. Its
    model_args are bundle=FOLDER, weights=DOMAIN, weights=adaptive or "weights=math:0.5;code:0.5", combine=log-linear,
    student=true, provider=cpu, threads=N and max_length=N. With --json before `run`, the results are one JSON document.
    """
    if console.as_json:
        check_json(arguments)

    import lm_eval.evaluator  # noqa: F401 - fails early if a package of the extra is missing
    from lm_eval.__main__ import cli_evaluate

    from edgemix.cli.lm_eval import model  # noqa: F401 - registers the model

    with TemporaryDirectory() as folder, harness_failures():
        with program("lm-eval", *arguments, *(("--output_path", folder) if console.as_json else ())):
            cli_evaluate()
        if console.as_json:
            console.document(read_results(Path(folder)))


lm_eval.allow_interspersed_args = False  # the harness parses what follows `run`


def check_json(arguments: tuple[str, ...]) -> None:
    """Raise click.UsageError if --json cannot be combined with the harness's arguments."""
    if arguments[0] != "run":
        raise click.UsageError(f"--json prints the results of `run`, and {arguments[0]!r} has none.")
    if any(argument.startswith(("--o", "-o")) for argument in arguments):
        raise click.UsageError("--json prints what --output_path would write: give only one.")


def read_results(folder: Path) -> object:
    """Return the results file that the harness wrote."""
    for path in folder.rglob("results_*.json"):
        return json.loads(path.read_bytes())  # may hold NaN, which strict parsers refuse
    raise EdgemixError("lm-evaluation-harness ended without results")


@contextmanager
def program(*arguments: str) -> Iterator[None]:
    """Replace sys.argv, for a library that reads its arguments there."""
    saved, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = saved


@contextmanager
def harness_failures() -> Iterator[None]:
    """Report exceptions of the harness as failures, not as bugs of edgemix."""
    try:
        yield
    except EdgemixError:
        raise
    except Exception as error:
        message = error.args[0] if error.args and isinstance(error.args[0], str) else repr(error)
        raise EdgemixError(f"lm-evaluation-harness: {message}", f"{DEBUG}=1 shows where it happened.") from error
