"""Where output goes: results on stdout, as text for people or one JSON document; progress on stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console as RichConsole

    from edgemix.progress import Progress


class Console:
    """One command's way to speak.

    Args:
        as_json: True if stdout shall hold one JSON document and nothing else.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """With --json, whatever a library prints goes to stderr: stdout stays one document."""
        if not self.as_json:
            yield
            return
        with redirect_stdout(sys.stderr):
            yield

    @cached_property
    def progress(self) -> Progress:
        """Bars if stderr is a terminal, else a line at the end of each stage."""
        from edgemix.cli.progress import Bars, Lines

        if sys.stderr.isatty():
            from rich.console import Console as RichConsole

            return Bars(RichConsole(stderr=True, highlight=False))
        return Lines()

    def document(self, value: object) -> None:
        """Print the command's JSON document; paths and arrays are understood, and NaN becomes null."""
        import msgspec

        encoded = msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=2)
        click.echo(encoded.decode(), file=self._stdout)

    def line(self, text: str = "") -> None:
        """Print a line for people; silent with --json."""
        if not self.as_json:
            click.echo(printable(text), file=self._stdout)

    def write(self, text: str, colour: int | None = None) -> None:
        """Print a piece of generated text as it comes; silent with --json. A terminal gets nothing that steers it, and
        the colour of that number, if one is given.
        """
        if self.as_json:
            return
        if self._stdout.isatty():
            text = printable(text)
            text = text if colour is None else click.style(text, fg=_COLOURS[colour % len(_COLOURS)])
        click.echo(text, file=self._stdout, nl=False)

    def heading(self, text: str) -> None:
        """Print a line that stands out, for people; silent with --json."""
        if not self.as_json:
            click.secho(printable(text), bold=True, file=self._stdout)

    def note(self, text: str) -> None:
        """Print a line beside the results, on stderr."""
        click.secho(printable(text), err=True, dim=True)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        left: int = 1,
        coloured: bool = False,
    ) -> None:
        """Print a table; the first `left` columns are names (aligned left), the others figures (aligned right).

        In one that is coloured each row has the colour that `write` knows by its number.
        """
        if self.as_json:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns), pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(Text(printable(column)), justify="left" if index < left else "right", overflow="fold")
        for number, row in enumerate(rows):
            style = _COLOURS[number % len(_COLOURS)] if coloured else None
            table.add_row(*(Text(printable(cell)) for cell in row), style=style)
        self.heading(title)
        self._rich.print(table)
        self._rich.print()

    @cached_property
    def _rich(self) -> RichConsole:
        from rich.console import Console as RichConsole

        return RichConsole(file=self._stdout, highlight=False)


_COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, *range(128, 160)), "\ufffd")


def printable(text: str) -> str:
    """Text with every control character replaced, but for tabs and line ends: escape sequences steer terminals."""
    return text.translate(_CONTROLS)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _plain(value: object) -> object:
    """What msgspec does not encode itself."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
