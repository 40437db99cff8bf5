"""Progress of long prompts: a callback, by context, for the tokens that graphs read."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CALLBACK: ContextVar[Callable[[float], None] | None] = ContextVar("callback", default=None)


def report_tokens(tokens: int) -> None:
    """Report that a graph's call has read `tokens` tokens."""
    if (callback := _CALLBACK.get()) is not None:
        callback(tokens)


@contextmanager
def token_callback(callback: Callable[[float], None]) -> Iterator[None]:
    """Within this context, call `callback` with the tokens of every call of a graph."""
    token = _CALLBACK.set(callback)
    try:
        yield
    finally:
        _CALLBACK.reset(token)
