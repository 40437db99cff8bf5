"""Work in a thread that can be cancelled between two calls of a graph, and its bridge to asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import aclosing, closing, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Generic, TypeVar

from edgemix.errors import EdgemixError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

T = TypeVar("T")

LOG = logging.getLogger(__name__)
_CANCELLED: ContextVar[threading.Event | None] = ContextVar("cancelled", default=None)


class Cancelled(BaseException):
    """Raised in work that was cancelled. It is no `Exception`: handlers of errors let it through."""


def failure(error: BaseException) -> EdgemixError:
    """Return the error that ends one text of several: a library's panic or want of memory must not end the others.

    Raises:
        BaseException: `error` itself, where it ends the work as a whole: an interruption, or a cancellation.
    """
    if isinstance(error, Cancelled | KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    LOG.debug("a text failed", exc_info=error)
    cause: BaseException | None = error
    while cause is not None and cause.__traceback__ is not None:
        cause.__traceback__ = None  # its frames hold caches, and often the error itself
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, EdgemixError):
        return error
    found = EdgemixError(f"{type(error).__name__}: {error}")
    found.__cause__ = error
    return found


def check() -> None:
    """Raise Cancelled in a thread whose work was cancelled; does nothing elsewhere."""
    event = _CANCELLED.get()
    if event is not None and event.is_set():
        raise Cancelled


async def in_thread(work: Callable[[], T]) -> T:
    """Run work in a thread, and return or raise what it does; cancelling the task cancels the work and waits for its
    end.
    """

    def once() -> Generator[T]:
        yield work()

    async with aclosing(iterate(once())) as results:
        return await anext(results)


async def iterate(items: Generator[T]) -> AsyncGenerator[T]:
    """Yield the items that a generator makes in a thread of its own, each when it is requested.

    Closing this, or cancelling the task that waits for the next item, cancels the work and waits until it has ended.
    """
    stream = _Stream(asyncio.get_running_loop(), items)
    stream.start()
    try:
        while True:
            stream.wanted.release()
            if (item := await stream.queue.get()) is None:
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item.value
    finally:
        await stream.cancel()


class _Item(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value


class _Failure:
    def __init__(self, error: Exception) -> None:
        self.error = error


class _Stream(threading.Thread, Generic[T]):
    """The thread, and the queue by which it passes items to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, items: Generator[T]) -> None:
        super().__init__(name="edgemix", daemon=True)
        self.queue: asyncio.Queue[_Item[T] | _Failure | None] = asyncio.Queue()
        self.wanted = threading.Semaphore(0)
        self._ended, self._cancelled = asyncio.Event(), threading.Event()
        self._loop, self._items = loop, items

    def run(self) -> None:
        _CANCELLED.set(self._cancelled)
        last: _Failure | None = None
        try:
            with suppress(Cancelled), closing(self._items):
                self._wait()
                for item in self._items:
                    self._post(self.queue.put_nowait, _Item(item))
                    self._wait()
        except Exception as error:  # noqa: BLE001 - passed on to the task that waits
            last = _Failure(error)
        except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust, say
            last = _Failure(EdgemixError(f"{type(error).__name__}: {error}"))
        self._post(self.queue.put_nowait, last)
        self._post(self._ended.set)

    async def cancel(self) -> None:
        """Stop the work, and wait until it has ended, however often the task that waits is cancelled."""
        self._cancelled.set()
        self.wanted.release()
        cancelled: asyncio.CancelledError | None = None
        while not self._ended.is_set() and not self._loop.is_closed():
            try:
                await self._ended.wait()
            except asyncio.CancelledError as error:
                cancelled = error
        if not self._loop.is_closed():
            self.join()
        if cancelled is not None:
            raise cancelled

    def _wait(self) -> None:
        """Wait until the next item is requested.

        Raises:
            Cancelled: It will not be.
        """
        while not self.wanted.acquire(timeout=1):
            if self._loop.is_closed():
                raise Cancelled
        check()

    def _post(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed
            self._cancelled.set()
            self.wanted.release()
