"""Failures as the user sees them: a message, a remedy, an exit code, and a traceback only on request."""

from __future__ import annotations

import _thread
import json
import os
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING

import click

from edgemix.cli.console import printable
from edgemix.errors import EdgemixError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEBUG = "EDGEMIX_DEBUG"
INTERRUPTED = 130


class InterruptError(EdgemixError):
    """Ctrl-C; the remedy says what is kept of the work."""

    exit_code = INTERRUPTED

    def __init__(self, remedy: str = "") -> None:
        super().__init__("interrupted", remedy)


@dataclass(frozen=True)
class Failure:
    """A failure's kind, message, remedy and exit code."""

    kind: str
    message: str
    remedy: str
    exit_code: int


@contextmanager
def translate_errors(command: str, *, extra: str, on_interrupt: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C and a missing optional package into errors with a remedy.

    Args:
        command: The command's name.
        extra: The extras that install its optional packages.
        on_interrupt: Returns the remedy after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptError(on_interrupt()) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in {"", "edgemix"} or not extra:
            raise
        raise EdgemixError(
            f"edgemix {command} needs the package {package}, which is not installed",
            f"pip install 'edgemix[{extra}]'",
        ) from error


@contextmanager
def report_failures(*, as_json: bool) -> Iterator[None]:
    """Turn any exception into a message on stderr, a JSON object on stdout with --json, and the exit code.

    A closed pipe does not arrive here: click exits quietly, with exit code 1.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the outermost handler
        if os.environ.get(DEBUG) and not isinstance(error, click.ClickException):
            traceback.print_exception(error)
        failure = describe(error)
        _print(failure, as_json=as_json)
        sys.exit(failure.exit_code)


def redeliver_interrupt(dropped: sys.UnraisableHookArgs) -> None:
    """Deliver Ctrl-C again that Python dropped inside a finalizer; the hook for unraisable exceptions."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()  # raised here, it would be dropped again
    elif os.environ.get(DEBUG):
        sys.__unraisablehook__(dropped)


def describe(error: Exception) -> Failure:
    """Return the message, remedy and exit code of an exception."""
    kind, remedy, exit_code = type(error).__name__, "", 1
    match error:
        case EdgemixError():
            message, remedy, exit_code = error.message, error.remedy, error.exit_code
        case click.UsageError():
            message, remedy, exit_code = error.format_message(), _usage(error), error.exit_code
        case click.ClickException():
            message, exit_code = error.format_message(), error.exit_code
        case click.Abort():
            message, exit_code = "interrupted", INTERRUPTED
        case MemoryError():
            message = "out of memory"
            remedy = "Close other programs, or use a smaller format or fewer members."
        case OSError() if error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        case _:
            message = f"unexpected {kind}: {shorten(str(error), 300, placeholder=' ...')}"
            remedy = f"This is a bug in edgemix; run with {DEBUG}=1 for the traceback and report it."
    return Failure(kind, message, remedy, exit_code)


def _usage(error: click.UsageError) -> str:
    if error.ctx is None:
        return ""
    return f"{error.ctx.get_usage()}\nHelp: {error.ctx.command_path} --help"


def _print(failure: Failure, *, as_json: bool) -> None:
    interrupted = failure.exit_code == INTERRUPTED  # not an error; the terminal's line already holds "^C"
    mark = "\n" if interrupted else click.style("error: ", fg="red", bold=True)
    with suppress(OSError):
        click.echo(mark + printable(failure.message), err=True)
        if failure.remedy:
            click.echo(printable(failure.remedy), err=True)
    if as_json:
        error = {"kind": failure.kind, "message": failure.message, "remedy": failure.remedy, "code": failure.exit_code}
        with suppress(OSError):
            click.echo(json.dumps({"error": error}, indent=2, ensure_ascii=False))
