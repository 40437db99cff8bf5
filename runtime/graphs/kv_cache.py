"""The key-value cache of a graph for a batch of sequences, of either kind (`graph_io.CacheKind`).

Both kinds, `shared_cache` and `growing_cache`, have the same few operations, and the rest of the runtime uses no
others: read more tokens, roll rows back, keep some rows, split the batch into single sequences and join them again.
A cache belongs to one call of one thread; sequences are independent of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.providers import Provider


@dataclass(frozen=True, slots=True)
class Slot:
    """One past input of a graph, the present output that continues it, and its fixed axes."""

    past: str
    present: str
    heads: int
    head_size: int


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The shapes and the place of a graph's cache.

    Attributes:
        slots: Keys and values of all layers.
        dtype: Their element type.
        provider: Where they live.
        context: Most tokens that a sequence can have.
        member_count: Members in the graph: to it, each sequence is that many rows, with a part of the heads each.
    """

    slots: tuple[Slot, ...]
    dtype: np.dtype[Any]
    provider: Provider
    context: int
    member_count: int = 1


class KVCache(ABC):
    """Key-value state of `batch` sequences.

    Attributes:
        lengths: int64 [batch], tokens read so far.
        calls: Bindings of the graph's calls, kept for later calls of the same size until the state moves.
        keeps_bindings: Whether bindings can be kept: they hold no state that was replaced.
    """

    keeps_bindings = True

    def __init__(self, layout: CacheLayout, batch: int) -> None:
        self.layout = layout
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64)
        self.calls: dict[Any, Any] = {}

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self.lengths.tolist(), default=0)

    @abstractmethod
    def reads_together(self, counts: Sequence[int]) -> bool:
        """Return whether one call of the graph can read `counts[b]` new tokens of every row b."""

    @abstractmethod
    def mask(self, new: int) -> NDArray[np.int64]:
        """Return the attention mask of a call that reads `new` tokens a row."""

    @abstractmethod
    def reserve(self, new: int) -> None:
        """Make room for `new` tokens a row."""

    @abstractmethod
    def bind(self, binding: Any) -> None:
        """Bind the past inputs and present outputs."""

    @abstractmethod
    def advance(self, binding: Any, new: int) -> None:
        """Take over the present outputs of a call that has read `new` tokens a row."""

    @abstractmethod
    def rollback(self, lengths: Sequence[int] | NDArray[np.int64]) -> None:
        """Drop each row's tokens beyond `lengths[b]`."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order (ascending)."""

    @abstractmethod
    def split(self, counts: Sequence[int]) -> list[Self]:
        """Return each row as a cache of its own, to read `counts[b]` tokens into it; `join` must follow."""

    @abstractmethod
    def join(self, rows: Sequence[Self]) -> None:
        """Join the rows from `split` again."""

    def reserve_rows(self, rows: int, tokens: int) -> None:  # noqa: B027 - a hint
        """Reserve memory for `rows` sequences of `tokens` tokens, where that saves copies later."""

    @abstractmethod
    def append(self, row: Self) -> None:
        """Copy a cache of one row as the last row."""

    @abstractmethod
    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""

    @abstractmethod
    def state(self, length: int) -> list[NDArray[Any]]:
        """Return the state of the first tokens of a cache of one row: per slot [heads, length, head_size]."""

    @classmethod
    @abstractmethod
    def holding(cls, layout: CacheLayout, state: Sequence[NDArray[Any]]) -> Self:
        """Return a cache of one row with a copy of that state."""

    def copy(self, length: int) -> Self:
        """Return the first tokens of a cache of one row as a cache of its own."""
        return self.holding(self.layout, self.state(length))

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of the memory that it holds."""

    @abstractmethod
    def free(self) -> None:
        """Free the memory; the cache cannot be used afterwards."""
