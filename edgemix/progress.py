"""Progress reports of long work, independent of how they are shown (the command line draws them with rich)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


class ProgressTask(Protocol):
    """The handle of one running stage."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Add `amount` to what is done of the stage's total; `note` (a loss, a file) replaces the last one shown."""


class Progress(Protocol):
    """A progress callback: `stage` opens a stage with `total` units of work, `log` shows a line that stays."""

    def stage(self, title: str, total: float | None = None) -> AbstractContextManager[ProgressTask]: ...

    def log(self, line: str) -> None: ...


class _NoProgress:
    """Ignores all reports; the default of every library call."""

    @contextmanager
    def stage(self, title: str, total: float | None = None) -> Iterator[ProgressTask]:  # noqa: ARG002
        yield self

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        pass

    def log(self, line: str) -> None:
        pass


NO_PROGRESS: Progress = _NoProgress()


class PrefixedProgress:
    """Passes all reports on to another progress callback, with a prefix ("math: ") before each title and line."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix

    def stage(self, title: str, total: float | None = None) -> AbstractContextManager[ProgressTask]:
        return self._progress.stage(f"{self._prefix}: {title}", total)

    def log(self, line: str) -> None:
        self._progress.log(f"{self._prefix}: {line}")
