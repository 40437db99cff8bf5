"""A sequence as one graph reads it; the graph may lag behind what has been written."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgemix.runtime.mixing.arithmetic import target_log_probabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from edgemix.runtime.graphs.kv_cache import KVCache
    from edgemix.runtime.mixing.ensemble import ActiveGraph


class LogitsChunk(NamedTuple):
    """Logits of consecutive positions of a text, by the active members of one graph.

    Attributes:
        start: Index of the first token that the logits predict.
        logits: For each active member float32 [positions, vocabulary]; the graph's next call overwrites them.
    """

    start: int
    logits: list[NDArray[np.float32]]


class SequenceState:
    """One graph with a key-value cache for one sequence.

    Args:
        active_graph: The graph and its active members.
        vocabulary: Size of the tokenizer's vocabulary; logits beyond it are cut off.
        cache: What the graph has read; a new, empty cache by default.

    Attributes:
        active_graph: As given.
        members: Indices of its active members in the ensemble.
        vocabulary: As given.
        cache: What the graph has read.
    """

    def __init__(self, active_graph: ActiveGraph, vocabulary: int, cache: KVCache | None = None) -> None:
        self.active_graph = active_graph
        self._graph, self._local_indices, self.members = active_graph
        self.vocabulary = vocabulary
        self.cache = cache or self._graph.new_cache()

    @property
    def context(self) -> int:
        """Most tokens that the graph can read."""
        return self._graph.context

    @property
    def tokens(self) -> NDArray[np.int64] | None:
        """The ids that the graph's logits are of; None for all."""
        return self._graph.tokens

    @property
    def read(self) -> int:
        """Number of tokens read so far."""
        return int(self.cache.lengths[0])

    def forward(self, ids: NDArray[np.int64], first: int) -> Iterator[LogitsChunk]:
        """Read on to the end of a text, and yield the logits that predict every position from `first` on, the one
        after the text included.

        Args:
            ids: int64 [tokens]; those read before are unchanged.
            first: A position that has not been predicted yet: above `read`, at most `len(ids)`.

        Raises:
            InputError: The text is longer than the context.
            EdgemixError: The graph fails.
        """
        at, end = self.read, len(ids)
        if first == end and end - at > 1:
            yield self._chunk(end, self._graph.extend(self.cache, [ids[at:]]))
            return
        if first - 1 > at:
            self._graph.extend(self.cache, [ids[at : first - 1]])
        for start in range(first - 1, end, self._graph.chunk):
            (logits,) = self._graph.extend_all(self.cache, [ids[start : start + self._graph.chunk]])
            yield self._chunk(start + 1, logits)

    def record(self, chunk: LogitsChunk, text: NDArray[np.int64], log_probabilities: NDArray[np.float64]) -> None:
        """Write down the log-probabilities of a text's tokens that a chunk predicts.

        Args:
            chunk: From `forward`.
            text: int64 [tokens].
            log_probabilities: float64 [members of the ensemble, tokens], nats; changed in place.
        """
        known = slice(chunk.start, min(chunk.start + len(chunk.logits[0]), len(text)))
        targets = text[known]
        for member, logits in zip(self.members, chunk.logits, strict=True):
            log_probabilities[member, known] = target_log_probabilities(logits[: len(targets)], targets)

    def truncate(self, length: int) -> None:
        """Undo the reading of tokens beyond the first `length` ones."""
        if self.read > length:
            self.cache.rollback([length])

    def close(self) -> None:
        """Free the cache."""
        self.cache.free()

    def _chunk(self, start: int, logits: NDArray[np.float32]) -> LogitsChunk:
        members = self._graph.parts(logits)
        return LogitsChunk(start, [members[index][:, : self.vocabulary] for index in self._local_indices])
