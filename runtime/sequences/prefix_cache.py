"""Key-value state of texts that have been read, for texts that begin alike: the same instructions, the turns before.

Kept are whole texts, the least recently used ones going first when there is no more room. A text that begins like one
of them gets a copy of what both have in common, so nobody's text is changed by somebody else's.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.sequences.state import SequenceState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.kv_cache import KVCache
    from edgemix.runtime.mixing.ensemble import ActiveGraph

LEAST = 16
"""Tokens that must be in common for a copy to be worth it."""


@dataclass(frozen=True, eq=False)
class PrefixEntry:
    """What one graph has read.

    Attributes:
        graph: The number by which the graph goes.
        text: int64 [tokens].
        cache: Of one row, with all of it.
        own: float64 [members of the graph, tokens], the text's log-probabilities, nats; NaN where nobody asked.
    """

    graph: int
    text: NDArray[np.int64]
    cache: KVCache
    own: NDArray[np.float64]


class PrefixCache:
    """Texts that graphs have read. Threads may share it.

    Args:
        room: Most bytes of key-value state that are kept; None sets no limit.
        texts: Most texts of a graph that are kept, at least one; None sets no limit.
    """

    def __init__(self, room: int | None, texts: int | None = None) -> None:
        self._room, self._texts, self._lock = room, texts, threading.Lock()
        self._kept: list[PrefixEntry] = []  # the least recently used one first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of key-value state that is kept."""
        return sum(kept.cache.bytes for kept in self._kept)

    def sequence(
        self, active_graph: ActiveGraph, vocabulary: int, text: NDArray[np.int64], heard_from: int
    ) -> tuple[SequenceState, NDArray[np.float64]]:
        """A graph's reader of a text, which has read as much of it as is known; never the last token.

        Args:
            listened: The graph, and who of it is listened to.
            vocabulary: The tokenizer's.
            text: int64 [tokens], at least one.
            heard_from: The first place whose log-probabilities are needed; where they were never asked for, the text
                must be read again from there.

        Returns:
            The reader, and what the members that are listened to gave the tokens that it has read, and perhaps the next
            one: float64 [members, tokens].
        """
        graph, own = id(active_graph.graph), list(active_graph.local_indices)
        with self._lock:
            found, read, common = None, LEAST - 1, 0
            for kept in self._kept:
                if kept.graph == graph:
                    both = common_length(kept.text, text)
                    most = _readable(kept.own[own, :both], len(text), heard_from)
                    if most > read:
                        found, read, common = kept, most, both
            if found is None:
                return SequenceState(active_graph, vocabulary), np.empty((len(own), 0))
            self._kept.remove(found)
            self._kept.append(found)
            return SequenceState(active_graph, vocabulary, found.cache.copy(read)), found.own[
                own, : min(read + 1, common)
            ]

    def keep(self, sequence: SequenceState, text: NDArray[np.int64], own: NDArray[np.float64]) -> None:
        """Keep what a reader has read; its cache is the reader's no more.

        Args:
            reader: Of one graph.
            text: int64, which begins with what it has read.
            own: float64 [its members, tokens], the text's log-probabilities.
        """
        read, cache = sequence.read, sequence.cache
        if read < LEAST:
            cache.free()
            return
        whole = np.full((sequence.active_graph.graph.member_count, read), np.nan)
        whole[list(sequence.active_graph.local_indices)] = own[:, :read]
        cache.calls = {}
        self.add(PrefixEntry(id(sequence.active_graph.graph), text[:read].copy(), cache, whole))

    def add(self, kept: PrefixEntry) -> None:
        """Keep one more, unless it is larger than all the room; others go if there is no more."""
        if self._room is not None and kept.cache.bytes > self._room:
            kept.cache.free()
            return
        with self._lock:
            # What a longer text has is not kept twice.
            self._kept = [each for each in self._kept if each.graph != kept.graph or not _begins(kept.text, each.text)]
            self._kept.append(kept)
            if self._texts is not None:
                for old in [each for each in self._kept if each.graph == kept.graph][: -self._texts]:
                    self._kept.remove(old)
            while self._room is not None and self.bytes > self._room:
                self._kept.pop(0).cache.free()

    def shared(self) -> PrefixCache:
        """Another one that begins with the same texts; what is added to one is not in the other. Not for one with a
        limit of bytes, which frees what others may still read.
        """
        other = PrefixCache(self._room, self._texts)
        other._kept = [*self.each()]
        return other

    def each(self) -> Iterator[PrefixEntry]:
        """All that is kept, the least recently used one first; nothing is forgotten meanwhile."""
        with self._lock:
            yield from self._kept

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            for kept in self._kept:
                kept.cache.free()
            self._kept = []


def _readable(own: NDArray[np.float64], tokens: int, heard_from: int) -> int:
    """How much of what a text of so many tokens has in common with one that is kept can be taken from that.

    What follows the last token taken is not heard again, so where it matters it must be known.
    """
    common: int = own.shape[1]
    if heard_from > common:
        return min(common, tokens - 1)
    unheard = np.isnan(own[:, heard_from:]).any(axis=0)
    known = heard_from + int(unheard.argmax()) if unheard.any() else common
    return min(known - 1, tokens - 1) if known > heard_from else min(heard_from - 1, tokens - 1)


def common_length(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Tokens with which both begin."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _begins(whole: NDArray[np.int64], part: NDArray[np.int64]) -> bool:
    return common_length(whole, part) == len(part)
