"""A conversation whose key-value state is kept between turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from edgemix.errors import InputError
from edgemix.runtime.cancellation import in_thread, iterate
from edgemix.runtime.decoding.generate import chunks, completed, decode
from edgemix.runtime.options import ChatOptions, GenerateOptions, Settings
from edgemix.runtime.sequences import prefix_file
from edgemix.runtime.sequences.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    from edgemix.runtime.loaded_bundle import LoadedBundle
    from edgemix.runtime.results import Chunk, Completion


class Session:
    """A conversation: each turn reads only what is new. Made by `Mixture.session`; one turn at a time.

    Messages go through the tokenizer's chat template. A turn that is interrupted (its stream closed, its task
    cancelled) leaves the beginning of the answer in the conversation; one that fails leaves the conversation as it was.

    Attributes:
        messages: The conversation so far: mappings with `role` and `content`. You may change it: what its beginning
            has in common with what was read is not read again.
    """

    def __init__(
        self, mixture: LoadedBundle, messages: Sequence[Mapping[str, Any]] = (), prefixes: PrefixCache | None = None
    ) -> None:
        if not all(isinstance(message, Mapping) for message in messages):
            raise InputError("a session begins with messages, each with a role and content")
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self._mixture = mixture
        self._prefixes = PrefixCache(None, texts=1) if prefixes is None else prefixes

    @property
    def bytes(self) -> int:
        """Bytes of key-value state that are kept."""
        return self._prefixes.bytes

    def stream(
        self,
        content: str,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Chunk]:
        """Send a message, and stream the assistant's answer; see `Mixture.stream_chat`. Tools are those of this turn.

        Raises:
            InputError: As `Mixture.chat`.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        ids = self._mixture.render_chat(messages, tools=tools, parse_special=parse_special)
        settings = Settings.of(**options)
        decoded = decode(self._mixture, [ids], settings, started=time.perf_counter(), kept=self._prefixes)
        return self._answer(messages, chunks(decoded))

    def send(self, content: str, **options: Unpack[ChatOptions]) -> Completion:
        """Send a message, and return the assistant's whole answer.

        Raises:
            InputError: As `Mixture.chat`.
        """
        return completed(self.stream(content, **options))

    def astream(self, content: str, **options: Unpack[ChatOptions]) -> AsyncGenerator[Chunk]:
        """As `stream`, for asyncio: see `Mixture.astream`."""
        return iterate(self.stream(content, **options))

    async def asend(self, content: str, **options: Unpack[ChatOptions]) -> Completion:
        """As `send`, for asyncio: see `Mixture.agenerate`."""
        return await in_thread(lambda: self.send(content, **options))

    def fork(self) -> Self:
        """Return another session that begins with this conversation; later turns of one do not affect the other.

        It costs no memory.
        """
        return type(self)(self._mixture, self.messages, self._prefixes.shared())

    def save(self, path: str | Path) -> None:
        """Write the conversation, and what was read of it, to a file for `Mixture.restore`.

        Raises:
            EdgemixError: It cannot be written; an old file is untouched.
        """
        mixture = self._mixture
        prefix_file.write(Path(path), self._prefixes, mixture.manifest, mixture.graphs(), self.messages)

    def _answer(self, messages: list[dict[str, Any]], answer: Generator[Chunk]) -> Generator[Chunk]:
        """Yield an answer's chunks; what was generated so far is part of the conversation."""
        before, text = self.messages, ""
        with closing(answer):
            try:
                for chunk in answer:
                    text += chunk.text
                    if text or chunk.completion is not None:
                        self.messages = [*messages, {"role": "assistant", "content": text}]
                    yield chunk
            except Exception:
                self.messages = before
                raise
