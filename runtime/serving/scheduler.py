"""A scheduler that generates for many requests at once, in a thread of its own, by continuous batching."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from contextlib import aclosing, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np

from edgemix.errors import EdgemixError, InputError
from edgemix.runtime.cancellation import failure
from edgemix.runtime.decoding.batch import ContinuousBatch
from edgemix.runtime.decoding.request import GenerationRequest
from edgemix.runtime.options import GenerateOptions, Settings
from edgemix.runtime.text.completion import CompletionBuilder
from edgemix.runtime.text.grammar import Grammar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator

    from numpy.typing import NDArray

    from edgemix.runtime.decoding.tokens import Token
    from edgemix.runtime.loaded_bundle import LoadedBundle
    from edgemix.runtime.results import Chunk, Completion


class RequestHandle:
    """A submitted request: iterate it for chunks as they are generated, or wait for its completion.

    `async for` and `aresult` are the same for asyncio. Only one consumer may read it.
    """

    def __init__(self, scheduler: BatchScheduler, request: GenerationRequest, completion: CompletionBuilder) -> None:
        self.request, self.completion, self._scheduler = request, completion, scheduler
        self._chunks: queue.SimpleQueue[Chunk | Exception | None] = queue.SimpleQueue()
        self._last: Chunk | Exception | None = None
        self._ended = self._read = False
        self._notify: Callable[[], object] = _ignore

    def put(self, chunk: Chunk | Exception | None) -> None:
        """Pass on a chunk, an error, or None where the request was cancelled. The scheduler calls this."""
        self._chunks.put(chunk)
        self._notify()

    def __iter__(self) -> Generator[Chunk]:
        """Yield new text and tokens as they are generated; the last chunk carries the completion. Ends early when
        cancelled.

        Raises:
            InputError: Another consumer reads it.
            EdgemixError: A graph fails, or the scheduler was closed.
        """
        with self._reading():
            while True:
                chunk = self._last if self._ended else self._chunks.get()
                if (new := self._take(chunk)) is not None:
                    yield new
                if self._ended:
                    return

    async def __aiter__(self) -> AsyncGenerator[Chunk]:
        """Yield the same for asyncio. Cancelling the task that waits, or leaving the loop, cancels the request.

        Raises:
            InputError, EdgemixError: As `__iter__`.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the event loop is closed
                self._notify = _ignore
                self.cancel()

        with self._reading():
            self._notify = notify
            try:
                while True:
                    try:
                        chunk = self._last if self._ended else self._chunks.get_nowait()
                    except queue.Empty:
                        await arrived.wait()
                        arrived.clear()
                        continue
                    if (new := self._take(chunk)) is not None:
                        yield new
                    if self._ended:
                        return
            finally:
                self._notify = _ignore
                if not self._ended:
                    self.cancel()

    async def aresult(self) -> Completion:
        """Wait for the whole completion with asyncio; raises as `result`."""
        async with aclosing(
            self.__aiter__()
        ) as chunks:  # a generator that is left open would be its reader for a while
            async for chunk in chunks:
                if chunk.completion is not None:
                    return chunk.completion
        raise EdgemixError("the text was cancelled")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Be the only consumer."""
        if self._read:
            raise InputError("another consumer reads this request already", "Submit the prompt again.")
        self._read = True
        try:
            yield
        finally:
            self._read = False

    def _take(self, chunk: Chunk | Exception | None) -> Chunk | None:
        """Return a chunk, or raise an error; remembers whether it is the last one."""
        self._ended = chunk is None or isinstance(chunk, Exception) or chunk.completion is not None
        self._last = chunk
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def result(self) -> Completion:
        """Wait for the whole completion.

        Raises:
            EdgemixError: A graph fails, the scheduler was closed, or the text was cancelled.
        """
        with closing(self.__iter__()) as chunks:
            for chunk in chunks:
                if chunk.completion is not None:
                    return chunk.completion
        raise EdgemixError("the text was cancelled")

    def cancel(self) -> None:
        """Stop generating; chunks that were yielded stay valid."""
        self._scheduler.cancel(self)


def _ignore() -> None:
    """Do nothing: no event loop waits for chunks."""


class BatchScheduler:
    """Generates for many requests at once with one mixture. Close it, or use it as a context manager.

    Args:
        mixture: Must stay open as long as the scheduler.
        most: Requests in the batch; others wait.
        waiting: Requests that may wait; more are refused.
    """

    def __init__(self, mixture: LoadedBundle, *, most: int = 16, waiting: int = 256) -> None:
        if most < 1 or waiting < 0:
            raise InputError(f"most must be at least 1 and waiting at least 0, not {most} and {waiting}")
        self._mixture, self._most, self._room = mixture, most, most + waiting
        all_members = mixture.ensemble(dict.fromkeys(mixture.members, 1.0))
        self._batch = ContinuousBatch(all_members, most, mixture.prefixes)
        self._handles: dict[int, RequestHandle] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="edgemix", daemon=True)
        self._thread.start()

    def submit(self, prompt: str, **options: Unpack[GenerateOptions]) -> RequestHandle:
        """Submit a prompt to be continued; arguments are checked at once, and the call does not wait.

        The result is the one that `Mixture.generate` gives for it.

        Raises:
            InputError: The prompt is empty or longer than the context, or an option is out of its bounds.
            EdgemixError: Too many requests are waiting, or the scheduler is closed.
        """
        started, settings, mixture = time.perf_counter(), Settings.of(**options), self._mixture
        if options.get("progress") is not None:
            raise InputError("a scheduler reads many prompts at once and reports no progress", "Leave progress out.")
        ids = mixture.encode_prompt(prompt)
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

        completion = CompletionBuilder(
            mixture.tokenizer,
            ids,
            settings.stop,
            batch_tokens=len(ids),
            started=started,
            log_probabilities=log_probabilities,
            attribution=request.attribution_from if settings.attribution else None,
        )
        handle = RequestHandle(self, request, completion)
        with self._lock:
            if self._closed:
                raise EdgemixError("this scheduler is closed")
            if len(self._handles) >= self._room:
                raise EdgemixError(f"{self._room} requests are running or waiting", "Submit it again later.")
            self._handles[id(request)] = handle
        self._inbox.put(partial(self._batch.add, request))
        return handle

    def cancel(self, handle: RequestHandle) -> None:
        """See `RequestHandle.cancel`."""
        with self._lock:
            found = self._handles.pop(id(handle.request), None)
        if found is not None:
            self._inbox.put(partial(self._batch.cancel, handle.request))
            handle.put(None)

    def close(self) -> None:
        """Stop, and free the caches; requests that are not finished fail."""
        self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while self._apply_actions():
                try:
                    results = self._batch.step()
                except BaseException as error:  # noqa: BLE001 - the next texts are served all the same
                    self._end(self._batch.reset(), failure(error))
                    continue
                for request, token in results:
                    self._deliver(request, token)
        finally:  # also where this thread is told to exit: nobody waits for ever
            with self._lock:
                self._closed = True
                unfinished = [handle.request for handle in self._handles.values()]
            self._end(unfinished, EdgemixError("this scheduler is closed"))
            self._batch.close()

    def _end(self, requests: Iterable[GenerationRequest], error: EdgemixError) -> None:
        """End requests with an error; those that have ended or were cancelled are left alone."""
        with self._lock:
            handles = [self._handles.pop(id(request), None) for request in requests]
        for handle in handles:
            if handle is not None:
                handle.put(error)

    def _apply_actions(self) -> bool:
        """Apply what was submitted and cancelled since the last step; wait where there is nothing to generate.

        Returns:
            False where the scheduler is to stop.
        """
        while not (self._inbox.empty() and len(self._batch)):
            action = self._inbox.get()
            if action is None:
                return False
            action()
        return True

    def _deliver(self, request: GenerationRequest, token: Token | EdgemixError) -> None:
        if isinstance(token, EdgemixError):
            self._end([request], token)
            return
        with self._lock:
            handle = self._handles.get(id(request))
        if handle is None:
            return
        try:
            chunk = handle.completion.add(token)
        except BaseException as error:  # noqa: BLE001 - a tokenizer's panic, say, is this text's alone
            self._batch.cancel(request)
            self._end([request], failure(error))
            return
        if chunk is None:
            return
        if chunk.completion is not None:
            with self._lock:
                self._handles.pop(id(request), None)
            if token.finish_reason is None:  # a stop string
                self._batch.cancel(request)
        handle.put(chunk)
