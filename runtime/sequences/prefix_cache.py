"""The prefix cache: key-value state of texts that were read, for texts that have the same beginning.

Whole texts are kept; the least recently used ones are dropped when there is no more room. A text that begins like one
of them gets a copy of the state of what both have in common, so no text can change another one's state.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.cancellation import failure
from edgemix.runtime.sequences.state import SequenceState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.kv_cache import KVCache
    from edgemix.runtime.mixing.ensemble import ActiveGraph

LEAST = 16
"""Fewest tokens in common for which a copy is worth its time."""


@dataclass(frozen=True, eq=False)
class PrefixEntry:
    """What one graph has read of one text.

    Attributes:
        graph: Identity of the graph.
        text: int64 [tokens].
        cache: Of one row, with the full text.
        log_probabilities: float64 [members of the graph, tokens], nats; NaN where they were not computed.
    """

    graph: int
    text: NDArray[np.int64]
    cache: KVCache
    log_probabilities: NDArray[np.float64]


class PrefixCache:
    """Texts that graphs have read. Threads may share one cache.

    Args:
        room: Most bytes of key-value state that are kept; None sets no limit.
        texts: Most texts of a graph that are kept, at least one; None sets no limit.
    """

    def __init__(self, room: int | None, texts: int | None = None) -> None:
        self._room, self._texts, self._lock = room, texts, threading.Lock()
        self._entries: list[PrefixEntry] = []  # the least recently used one first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of key-value state that are kept."""
        return sum(entry.cache.bytes for entry in self._entries)

    def sequence(
        self, active_graph: ActiveGraph, vocabulary: int, text: NDArray[np.int64], first_needed: int
    ) -> tuple[SequenceState, NDArray[np.float64]]:
        """Return a graph's state of a text, which has read as much of it as is known; never the last token.

        Args:
            active_graph: The graph and its active members.
            vocabulary: Size of the tokenizer's vocabulary.
            text: int64 [tokens], at least one.
            first_needed: The first position whose log-probabilities are needed; where they were not computed, the text
                must be read again from there.

        Returns:
            The state, and the active members' log-probabilities of the tokens that it has read, and perhaps of the next
            one: float64 [members, tokens].
        """
        graph, members = id(active_graph.graph), list(active_graph.local_indices)
        with self._lock:
            found, read, common = None, LEAST - 1, 0
            for entry in self._entries:
                if entry.graph == graph:
                    both = common_length(entry.text, text)
                    most = _readable(entry.log_probabilities[members, :both], len(text), first_needed)
                    if most > read:
                        found, read, common = entry, most, both
            if found is None:
                return SequenceState(active_graph, vocabulary), np.empty((len(members), 0))
            self._entries.remove(found)
            self._entries.append(found)
            known = found.log_probabilities[members, : min(read + 1, common)]
            return SequenceState(active_graph, vocabulary, found.cache.copy(read)), known

    def keep(self, sequence: SequenceState, text: NDArray[np.int64], log_probabilities: NDArray[np.float64]) -> None:
        """Keep what a sequence's state has read; the state loses its cache. Where there is no memory, nothing is kept.

        Args:
            sequence: The state of one graph.
            text: int64, which begins with what it has read.
            log_probabilities: float64 [its active members, tokens].
        """
        read, cache = sequence.read, sequence.cache
        if read < LEAST:
            cache.free()
            return
        try:
            full = np.full((sequence.active_graph.graph.member_count, read), np.nan)
            full[list(sequence.active_graph.local_indices)] = log_probabilities[:, :read]
            cache.calls = {}
            self.add(PrefixEntry(id(sequence.active_graph.graph), text[:read].copy(), cache, full))
        except BaseException as error:  # noqa: BLE001 - `failure` passes on what is not this text's alone
            cache.free()
            failure(error)

    def add(self, entry: PrefixEntry) -> None:
        """Add an entry, unless it is larger than all the room; others are dropped if there is no more room."""
        if self._room is not None and entry.cache.bytes > self._room:
            entry.cache.free()
            return
        with self._lock:
            # What a longer text has is not kept twice.
            self._entries = [
                each for each in self._entries if each.graph != entry.graph or not _begins(entry.text, each.text)
            ]
            self._entries.append(entry)
            if self._texts is not None:
                for old in [each for each in self._entries if each.graph == entry.graph][: -self._texts]:
                    self._entries.remove(old)
            while self._room is not None and self.bytes > self._room:
                self._entries.pop(0).cache.free()

    def shared(self) -> PrefixCache:
        """Return another cache that begins with the same texts; later additions to one are not in the other.

        Not for a cache with a limit of bytes, which frees what others may still read.
        """
        other = PrefixCache(self._room, self._texts)
        other._entries = [*self.each()]
        return other

    def each(self) -> Iterator[PrefixEntry]:
        """Yield all entries, the least recently used one first; none is dropped meanwhile."""
        with self._lock:
            yield from self._entries

    def clear(self) -> None:
        """Drop all texts."""
        with self._lock:
            for entry in self._entries:
                entry.cache.free()
            self._entries = []


def _readable(log_probabilities: NDArray[np.float64], tokens: int, first_needed: int) -> int:
    """Return how many tokens of a kept text can be taken over by a text of `tokens` tokens.

    The logits after the last token taken are not computed again: where its log-probability is needed it must be
    known.
    """
    common: int = log_probabilities.shape[1]
    if first_needed > common:
        return min(common, tokens - 1)
    unknown = np.isnan(log_probabilities[:, first_needed:]).any(axis=0)
    known = first_needed + int(unknown.argmax()) if unknown.any() else common
    return min(known - 1, tokens - 1) if known > first_needed else min(first_needed - 1, tokens - 1)


def common_length(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Return the number of tokens that both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _begins(full: NDArray[np.int64], part: NDArray[np.int64]) -> bool:
    return common_length(full, part) == len(part)
