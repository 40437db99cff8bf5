"""A member's key-value state for a batch of sequences, whichever way a graph passes it on in (`graph_io.CacheKind`).

Both kinds, `shared_cache` and `growing_cache`, offer the same few moves, and the rest of the runtime knows no others:
read more tokens, roll rows back, keep some rows, take the batch apart into single sequences and put it together again.
A cache belongs to one call of one thread; sequences never see each other.
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
    """What a cache must know of its graph.

    Attributes:
        slots: Keys and values of all layers.
        dtype: Their element type.
        provider: Where they live.
        context: Most tokens that a sequence can have.
        members: For how many members the graph speaks: to it, each sequence is so many, with a part of its heads each.
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
        calls: Bindings that the member's calls left here to use again, by what they read, until the state moves.
        keeps_bindings: Whether that can be done: a binding holds no state that was replaced.
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
        """Tokens of the longest sequence."""
        return max(self.lengths.tolist(), default=0)

    @abstractmethod
    def reads_together(self, counts: Sequence[int]) -> bool:
        """Whether one call of the graph can read `counts[b]` new tokens of every row b."""

    @abstractmethod
    def mask(self, new: int) -> NDArray[np.int64]:
        """The attention mask of a call that reads `new` tokens a row."""

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
        """Forget each row's tokens beyond `lengths[b]`."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order (ascending)."""

    @abstractmethod
    def split(self, counts: Sequence[int]) -> list[Self]:
        """Each row as a cache of its own, to read `counts[b]` tokens into it; `join` must follow."""

    @abstractmethod
    def join(self, rows: Sequence[Self]) -> None:
        """Put the rows from `split` together again."""

    @abstractmethod
    def append(self, row: Self) -> None:
        """Take a copy of a cache of one row as the last row."""

    @abstractmethod
    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""

    @abstractmethod
    def state(self, length: int) -> list[NDArray[Any]]:
        """What a cache of one row holds of its first tokens: a slot each, [heads, length, head_size]."""

    @classmethod
    @abstractmethod
    def holding(cls, layout: CacheLayout, state: Sequence[NDArray[Any]]) -> Self:
        """A cache of one row with a copy of that."""

    def copy(self, length: int) -> Self:
        """The first tokens of a cache of one row as a cache of its own."""
        return self.holding(self.layout, self.state(length))

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Of the memory that it holds."""

    @abstractmethod
    def free(self) -> None:
        """Let go of the memory; the cache is of no more use."""
