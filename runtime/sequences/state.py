"""A graph that reads one sequence, and may lag behind what has been written."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgemix.runtime.mixing.arithmetic import target_log_probabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from edgemix.runtime.graphs.kv_cache import KVCache
    from edgemix.runtime.mixing.ensemble import Listened


class Heard(NamedTuple):
    """What follows some tokens of a text, as a graph's voices say.

    Attributes:
        start: Place of the first token that follows.
        logits: Voice by voice, float32 [places, vocabulary]; the graph's next call overwrites them.
    """

    start: int
    logits: list[NDArray[np.float32]]


class Reader:
    """One graph with a cache for one sequence.

    Args:
        listened: The graph, and who of it is listened to.
        vocabulary: The tokenizer's; logits beyond it are cut off.
        cache: What it has read; an empty one of its own by default.

    Attributes:
        listened: As it was given.
        voices: The numbers, among a blend's, of those of its voices that are listened to.
        vocabulary: As it was given.
        cache: What it has read.
    """

    def __init__(self, listened: Listened, vocabulary: int, cache: KVCache | None = None) -> None:
        self.listened = listened
        self._member, self._own, self.voices = listened
        self.vocabulary = vocabulary
        self.cache = cache or self._member.new_cache()

    @property
    def context(self) -> int:
        """Most tokens that it can read."""
        return self._member.context

    @property
    def tokens(self) -> NDArray[np.int64] | None:
        """The ids that its logits are of; None for all."""
        return self._member.tokens

    @property
    def read(self) -> int:
        """Tokens read so far."""
        return int(self.cache.lengths[0])

    def listen(self, ids: NDArray[np.int64], first: int) -> Iterator[Heard]:
        """Read on to the end of a text, and hear what comes at every place from `first` on, the one behind it included.

        Args:
            ids: int64 [tokens], of which those read before are as they were.
            first: A place that has not been heard of: above `read`, at most `len(ids)`.

        Raises:
            InputError: The text is longer than the context.
            EdgemixError: The graph fails.
        """
        at, end = self.read, len(ids)
        if first == end and end - at > 1:
            yield self._heard(end, self._member.extend(self.cache, [ids[at:]]))
            return
        if first - 1 > at:
            self._member.extend(self.cache, [ids[at : first - 1]])
        for start in range(first - 1, end, self._member.chunk):
            (logits,) = self._member.extend_all(self.cache, [ids[start : start + self._member.chunk]])
            yield self._heard(start + 1, logits)

    def note(self, heard: Heard, text: NDArray[np.int64], own: NDArray[np.float64]) -> None:
        """Write down what was given to the tokens that a text has at the places heard of.

        Args:
            heard: From `listen`.
            text: int64 [tokens].
            own: float64 [the blend's voices, tokens], log-probabilities, nats; changed in place.
        """
        known = slice(heard.start, min(heard.start + len(heard.logits[0]), len(text)))
        targets = text[known]
        for voice, logits in zip(self.voices, heard.logits, strict=True):
            own[voice, known] = target_log_probabilities(logits[: len(targets)], targets)

    def forget(self, length: int) -> None:
        """Take back what was read beyond so many tokens."""
        if self.read > length:
            self.cache.rollback([length])

    def close(self) -> None:
        """Free the cache."""
        self.cache.free()

    def _heard(self, start: int, logits: NDArray[np.float32]) -> Heard:
        parts = self._member.parts(logits)
        return Heard(start, [parts[voice][:, : self.vocabulary] for voice in self._own])
