"""How long work tells that it goes on, without knowing who listens (the command line draws it with rich)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


class Task(Protocol):
    """One stage under way."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """`amount` more of the stage's total is done; `note` (a loss, a file) replaces the last one shown."""


class Progress(Protocol):
    """A listener: `stage` opens a stage, `say` shows a line that stays."""

    def stage(self, title: str, total: float | None = None) -> AbstractContextManager[Task]: ...

    def say(self, line: str) -> None: ...


class _Silence:
    """Listens to nothing; the default of every library call."""

    @contextmanager
    def stage(self, title: str, total: float | None = None) -> Iterator[Task]:  # noqa: ARG002
        yield self

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


SILENT: Progress = _Silence()


class Prefixed:
    """Passes everything on to another listener, with the name of what it is about before it."""

    def __init__(self, progress: Progress, about: str) -> None:
        self._progress, self._about = progress, about

    def stage(self, title: str, total: float | None = None) -> AbstractContextManager[Task]:
        return self._progress.stage(f"{self._about}: {title}", total)

    def say(self, line: str) -> None:
        self._progress.say(f"{self._about}: {line}")
