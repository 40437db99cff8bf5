"""Who hears, in this thread, of the tokens that graphs read: a long prompt's progress."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HEARS: ContextVar[Callable[[float], None] | None] = ContextVar("hears", default=None)


def heard(tokens: int) -> None:
    """Tell that a graph's call has read so many tokens."""
    if (hears := _HEARS.get()) is not None:
        hears(tokens)


@contextmanager
def told(hears: Callable[[float], None]) -> Iterator[None]:
    """Within, `hears` is called with the tokens of every call."""
    token = _HEARS.set(hears)
    try:
        yield
    finally:
        _HEARS.reset(token)
