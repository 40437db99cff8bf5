"""The decorator of all commands: adds --json, an example in the help, a console, and clear failures."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.console import Console
from edgemix.cli.failures import DEBUG, translate_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_QUIET = {
    "BITSANDBYTES_NOWELCOME": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


NOTHING = "Nothing was written."


def command(
    name: str,
    *,
    example: str,
    extra: str = "",
    on_interrupt: str = NOTHING,
    work: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a click command from a function whose first argument is a `Console`.

    Args:
        name: The command's name.
        example: Command lines for the help, one per line.
        extra: The extras of the distribution that the command needs, comma-separated.
        on_interrupt: Message after Ctrl-C that says what is kept of the work.
        work: Whether any is kept, by the command's arguments; else the message is that nothing was written.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: object) -> None:
            quiet_libraries()
            console = Console(as_json=as_json)

            def interrupted() -> str:
                return on_interrupt if work is None or work(arguments) else NOTHING

            with translate_errors(name, extra=extra, on_interrupt=interrupted), console.guarded():
                function(console, **arguments)

        lines = "\n".join(f"  {line}" for line in example.splitlines())
        made = click.command(name, epilog=f"\b\nExample:\n{lines}")(run)
        made.params.append(
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document instead of text.")
        )
        return made

    return decorate


def quiet_libraries() -> None:
    """Silence other packages' warnings, logs and progress bars; call it before they are imported."""
    if os.environ.get(DEBUG):
        return
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
