"""How long work tells that it goes on, without knowing who listens (the command line draws it with rich)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Task(Protocol):
    """One stage under way."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """`amount` more of the stage's total is done; `note` (a loss, a file) replaces the last one shown."""


class Progress(Protocol):
    """A listener: `stage` opens a stage, `say` shows a line that stays."""

    def stage(self, title: str, total: float | None = None) -> _TaskContext: ...

    def say(self, line: str) -> None: ...


class _TaskContext(Protocol):
    def __enter__(self) -> Task: ...

    def __exit__(self, *exception: object) -> bool | None: ...


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
