"""Many texts at once, which come and go: a thread of its own generates, and anybody may ask."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np

from edgemix.errors import EdgemixError, InputError
from edgemix.runtime.decoding.batch import ContinuousBatch, GenerationRequest
from edgemix.runtime.options import GenerateOptions, Settings
from edgemix.runtime.text.completion import CompletionBuilder
from edgemix.runtime.text.grammar import Grammar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from numpy.typing import NDArray

    from edgemix.runtime.decoding.tokens import Token
    from edgemix.runtime.mixture import Mixture
    from edgemix.runtime.results import Chunk, Completion


class RequestHandle:
    """A text that was asked for: iterate it for chunks as they come, or wait for its completion; `async for` and
    `aresult` are the same for asyncio. One reader only.
    """

    def __init__(self, server: BatchScheduler, request: GenerationRequest, writer: CompletionBuilder) -> None:
        self.request, self.writer, self._server = request, writer, server
        self._chunks: queue.SimpleQueue[Chunk | Exception | None] = queue.SimpleQueue()
        self._last: Chunk | Exception | None = None
        self._ended = self._read = False
        self._news: Callable[[], object] = _nobody

    def tell(self, chunk: Chunk | Exception | None) -> None:
        """Hand on what is new; the server does."""
        self._chunks.put(chunk)
        self._news()

    def __iter__(self) -> Iterator[Chunk]:
        """New text and tokens as they come; the last chunk carries the completion. Ends early when cancelled.

        Raises:
            InputError: Somebody else reads it.
            EdgemixError: A graph fails, or the server was closed.
        """
        with self._reading():
            while True:
                chunk = self._last if self._ended else self._chunks.get()
                if (new := self._take(chunk)) is not None:
                    yield new
                if self._ended:
                    return

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """The same for asyncio. A task that is cancelled while it waits, or a loop that is left, cancels the text.

        Raises:
            InputError, EdgemixError: As `__iter__`.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:  # the loop is closed: nobody listens
                self._news = _nobody
                self.cancel()

        with self._reading():
            self._news = tell
            try:
                while True:
                    try:
                        chunk = self._last if self._ended else self._chunks.get_nowait()
                    except queue.Empty:
                        await news.wait()
                        news.clear()
                        continue
                    if (new := self._take(chunk)) is not None:
                        yield new
                    if self._ended:
                        return
            finally:
                self._news = _nobody
                if not self._ended:
                    self.cancel()

    async def aresult(self) -> Completion:
        """The whole completion, for asyncio; raises as `result`."""
        async for chunk in self:
            if chunk.completion is not None:
                return chunk.completion
        raise EdgemixError("the text was cancelled")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Be the one who reads."""
        if self._read:
            raise InputError("somebody reads this ticket already", "Submit the prompt again for another reader.")
        self._read = True
        try:
            yield
        finally:
            self._read = False

    def _take(self, chunk: Chunk | Exception | None) -> Chunk | None:
        """What is new; remembers whether it is the last of it."""
        self._ended = chunk is None or isinstance(chunk, Exception) or chunk.completion is not None
        self._last = chunk
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def result(self) -> Completion:
        """The whole completion, waited for.

        Raises:
            EdgemixError: A graph fails, the server was closed, or the text was cancelled.
        """
        for chunk in self:
            if chunk.completion is not None:
                return chunk.completion
        raise EdgemixError("the text was cancelled")

    def cancel(self) -> None:
        """Stop generating; what is there stays with those who have it."""
        self._server.cancel(self)


def _nobody() -> None:
    """Nobody waits for news."""


class BatchScheduler:
    """Generates many texts at once with one mixture. Close it, or use it as a context manager.

    Args:
        mixture: Must stay open as long as the server.
        most: Texts in the batch; others wait.
        waiting: Texts that may wait; more are refused.
    """

    def __init__(self, mixture: Mixture, *, most: int = 16, waiting: int = 256) -> None:
        if most < 1 or waiting < 0:
            raise InputError(f"a batch of {most} texts with {waiting} waiting makes no sense")
        self._mixture, self._most, self._room = mixture, most, most + waiting
        everyone = mixture.ensemble(dict.fromkeys(mixture.members, 1.0))
        self._batch = ContinuousBatch(everyone, most, mixture.prefixes)
        self._tickets: dict[int, RequestHandle] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="edgemix", daemon=True)
        self._thread.start()

    def submit(self, prompt: str, **options: Unpack[GenerateOptions]) -> RequestHandle:
        """Ask for the continuation of a prompt; arguments are checked at once, and the call does not wait.

        What it yields is what `Mixture.generate` yields for it in a batch.

        Raises:
            InputError: The prompt is empty or longer than the context, or an option makes no sense.
            EdgemixError: Too many texts are waiting, or the server is closed.
        """
        begun, settings, mixture = time.perf_counter(), Settings.of(**options), self._mixture
        if options.get("progress") is not None:
            raise InputError("a server reads many prompts at once and tells no one's progress", "Leave progress out.")
        ids = mixture.tokenizer.encode(prompt)
        mixture.check_length(ids, "the prompt")
        (seed,) = settings.seeds(1)
        grammar = Grammar.of(settings.constraint, mixture.tokenizer)
        request = GenerationRequest.of(
            mixture.full_ensemble(settings.weights, settings.combine),
            np.arange(len(mixture.members)),
            ids,
            settings.sampling,
            seed=seed,
            max_new_tokens=settings.max_new_tokens,
            context=mixture.context,
            eos=mixture.manifest.tokenizer.eos,
            grammar_state=grammar.follow() if grammar else None,
            attribution=settings.attribution,
        )

        def log_probabilities() -> NDArray[np.float64]:
            return np.array(request.log_probabilities, np.float64)

        writer = CompletionBuilder(
            mixture.tokenizer,
            ids,
            settings.stop,
            batch_tokens=len(ids),
            started=begun,
            log_probabilities=log_probabilities,
            attribution=request.attribution_from if settings.attribution else None,
        )
        ticket = RequestHandle(self, request, writer)
        with self._lock:
            if self._closed:
                raise EdgemixError("this server is closed")
            if len(self._tickets) >= self._room:
                raise EdgemixError(f"{self._room} texts are being generated or waiting", "Ask again later.")
            self._tickets[id(request)] = ticket
        self._inbox.put(partial(self._batch.add, request))
        return ticket

    def cancel(self, ticket: RequestHandle) -> None:
        """See `RequestHandle.cancel`."""
        with self._lock:
            known = self._tickets.pop(id(ticket.request), None)
        if known is not None:
            self._inbox.put(partial(self._batch.cancel, ticket.request))
            ticket.tell(None)

    def close(self) -> None:
        """Stop, and free the caches; texts that are not finished fail."""
        self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        trouble: Exception = EdgemixError("this server is closed")
        try:
            while self._take_in():
                for request, token in self._batch.step():
                    self._tell(request, token)
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            trouble = error
        except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust, say
            trouble = EdgemixError(f"{type(error).__name__}: {error}")
        with self._lock:
            self._closed = True
            unfinished, self._tickets = list(self._tickets.values()), {}
        for ticket in unfinished:
            ticket.tell(trouble)
        self._batch.close()

    def _take_in(self) -> bool:
        """Do what was asked for since the last step; where there is nothing to generate, wait. False to stop."""
        while not (self._inbox.empty() and len(self._batch)):
            order = self._inbox.get()
            if order is None:
                return False
            order()
        return True

    def _tell(self, request: GenerationRequest, token: Token | EdgemixError) -> None:
        with self._lock:
            failed = isinstance(token, EdgemixError)
            ticket = self._tickets.pop(id(request), None) if failed else self._tickets.get(id(request))
        if ticket is None:
            return
        if isinstance(token, EdgemixError):
            ticket.tell(token)
            return
        if (chunk := ticket.writer.add(token)) is None:
            return
        if chunk.completion is not None:
            with self._lock:
                self._tickets.pop(id(request), None)
            if token.finish_reason is None:  # a stop string
                self._batch.cancel(request)
        ticket.tell(chunk)
