"""Output: results on stdout, as text or one JSON document; progress and notes on stderr."""

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
    """The output of one command.

    Args:
        as_json: Whether stdout gets one JSON document and nothing else.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """With --json, redirect what libraries print to stderr, so that stdout holds one document."""
        if not self.as_json:
            yield
            return
        with redirect_stdout(sys.stderr):
            yield

    @cached_property
    def progress(self) -> Progress:
        """The progress callback: bars if stderr is a terminal, else a line at the end of each stage."""
        from edgemix.cli.progress import BarProgress, LineProgress

        if sys.stderr.isatty():
            from rich.console import Console as RichConsole

            return BarProgress(RichConsole(stderr=True, highlight=False))
        return LineProgress()

    def document(self, value: object) -> None:
        """Print the command's JSON document; paths and arrays are encoded, and NaN becomes null."""
        import msgspec

        encoded = msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=2)
        click.echo(encoded.decode(), file=self._stdout)

    def line(self, text: str = "") -> None:
        """Print a line, unless --json is given."""
        if not self.as_json:
            click.echo(printable(text), file=self._stdout)

    def write(self, text: str, color: int | None = None) -> None:
        """Print a piece of generated text, unless --json is given.

        On a terminal, control characters are replaced, and `color` is an index into the colors of table rows.
        """
        if self.as_json:
            return
        if self._stdout.isatty():
            text = printable(text)
            text = text if color is None else click.style(text, fg=_COLORS[color % len(_COLORS)])
        click.echo(text, file=self._stdout, nl=False)

    def heading(self, text: str) -> None:
        """Print a bold line, unless --json is given."""
        if not self.as_json:
            click.secho(printable(text), bold=True, file=self._stdout)

    def note(self, text: str) -> None:
        """Print a dim line on stderr."""
        click.secho(printable(text), err=True, dim=True)

    def markdown(self, text: str) -> None:
        """Print Markdown, laid out on a terminal and as it is elsewhere; silent with --json."""
        if self.as_json:
            return
        if not self._stdout.isatty():
            click.echo(text, file=self._stdout, nl=False)
            return
        from rich.markdown import Markdown

        self._rich.print(Markdown(printable(text), hyperlinks=False))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        left: int = 1,
        colored: bool = False,
    ) -> None:
        """Print a table, unless --json is given.

        Args:
            title: The line above the table.
            columns: The columns' headings.
            rows: The cells, row by row.
            left: Number of leading columns that are aligned left; the others are aligned right.
            colored: Whether each row has a color, the one that `write` prints for the row's index.
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
            style = _COLORS[number % len(_COLORS)] if colored else None
            table.add_row(*(Text(printable(cell)) for cell in row), style=style)
        self.heading(title)
        self._rich.print(table)
        self._rich.print()

    @cached_property
    def _rich(self) -> RichConsole:
        from rich.console import Console as RichConsole

        return RichConsole(file=self._stdout, highlight=False)


_COLORS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, *range(128, 160)), "\ufffd")


def printable(text: str) -> str:
    """Replace every control character except tabs and line ends, as escape sequences control the terminal."""
    return text.translate(_CONTROLS)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _plain(value: object) -> object:
    """Convert a value that msgspec does not encode: an array to a list, anything else to a string."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
