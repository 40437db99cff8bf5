"""The two progress callbacks: bars for a terminal, plain lines for a log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.progress import TaskID

    from edgemix.progress import ProgressTask


LINE_INTERVAL = 60.0
"""Seconds between two lines about a running stage."""


class LineProgress:
    """Print a line on stderr when a stage ends, and one per minute while it runs."""

    @contextmanager
    def stage(self, title: str, total: float | None = None) -> Iterator[ProgressTask]:
        begun, task = time.monotonic(), _Line(self, title, total)
        yield task
        self.log(_ended(title, time.monotonic() - begun, task.note))

    def log(self, line: str) -> None:
        click.echo(line, err=True)


class BarProgress:
    """Show a bar on stderr for every running stage, and print a line when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=_column(3)),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim", table_column=_column(2)),
            console=console,
            transient=True,
            expand=True,
        )
        self._open = 0

    @contextmanager
    def stage(self, title: str, total: float | None = None) -> Iterator[ProgressTask]:
        if self._open == 0:
            self._bars.start()
        self._open += 1
        begun = time.monotonic()
        task = _Bar(self._bars, self._bars.add_task(title, total=total, note=""))
        try:
            yield task
            self.log(_ended(title, time.monotonic() - begun, task.note))
        finally:
            self._bars.remove_task(task.id)
            self._open -= 1
            if self._open == 0:
                self._bars.stop()

    def log(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


class _Stage:
    """A running stage that keeps its last note."""

    def __init__(self) -> None:
        self.note = ""

    def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002 - see ProgressTask
        self.note = note or self.note


class _Line(_Stage):
    """A stage that prints its share of work done at intervals."""

    def __init__(self, lines: LineProgress, title: str, total: float | None) -> None:
        super().__init__()
        self._lines, self._title, self._total = lines, title, total
        self._done, self._printed_at = 0.0, time.monotonic()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        super().advance(amount, note)
        self._done += amount
        if time.monotonic() - self._printed_at < LINE_INTERVAL:
            return
        self._printed_at = time.monotonic()
        share = f"{min(self._done / self._total, 1):.0%}" if self._total else "under way"
        self._lines.log(f"{self._title}: {share}" + (f" ({self.note})" if self.note else ""))


class _Bar(_Stage):
    """A stage drawn as a bar."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        super().__init__()
        self._bars = bars
        self.id = task

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        super().advance(amount, note)
        self._bars.update(self.id, advance=amount, note=self.note)


def _ended(title: str, seconds: float, note: str) -> str:
    return f"{title}: {seconds:.1f} s" + (f" ({note})" if note else "")


def _column(ratio: int) -> Column:
    return Column(ratio=ratio, no_wrap=True, overflow="ellipsis")
