"""A member's key-value state for a batch of sequences, in the two ways graphs pass it on (`graph_io.CacheKind`).

Both kinds offer the same few moves, and the rest of the runtime knows no others: read more tokens, roll rows back, keep
some rows, take the batch apart into single sequences and put it together again. A cache belongs to one call of one
thread; sequences never see each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edgemix.runtime.providers import exclusive, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.providers import Provider

FIRST_CAPACITY = 128
"""Slots of a fresh shared cache; it doubles from there."""
_LEAST = 2
"""Slots that a call writes at least: attention reads a single token doubled."""


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
        voices: For how many members the graph speaks: to it, each sequence is so many, with a part of its heads each.
    """

    slots: tuple[Slot, ...]
    dtype: np.dtype[Any]
    provider: Provider
    context: int
    voices: int = 1


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


class SharedCache(KVCache):
    """One buffer [batch, heads, capacity, head_size] a slot, bound as past and as present and written in place.

    Row b's tokens lie in places 0..length_b-1. A row is a contiguous part of the buffer, so it can be read into alone.
    The capacity doubles as it is needed, up to the context; a rollback is only a shorter length.
    """

    def __init__(self, layout: CacheLayout, batch: int) -> None:
        super().__init__(layout, batch)
        self.capacity = self._rows = 0
        self._buffers: list[Any] = []
        self._arrays: list[NDArray[Any]] = []
        self._first_row = 0
        self._ones = np.ones((1, 0), np.int64)

    def reads_together(self, counts: Sequence[int]) -> bool:
        # GroupQueryAttention takes several new tokens after a past for one sequence only.
        return self.batch == 1 or max(counts) == min(counts) == 1

    def mask(self, new: int) -> NDArray[np.int64]:
        if self.batch == 1:
            total = self.longest + new
            if total > self._ones.size:
                self._ones = np.ones((1, 2 * total), np.int64)
            return self._ones[:, :total]
        after = self.lengths + new
        return (np.arange(after.max()) < after[:, None]).astype(np.int64)

    def reserve(self, new: int) -> None:
        self._reserve(self.longest + max(new, _LEAST))

    def bind(self, binding: Any) -> None:
        device, dtype = self.layout.provider.device, self.layout.dtype
        for slot, buffer in zip(self.layout.slots, self._buffers, strict=True):
            voices = self.layout.voices
            shape = [self.batch * voices, slot.heads // voices, self.capacity, slot.head_size]
            row_bytes = slot.heads * self.capacity * slot.head_size * dtype.itemsize
            address = buffer.data_ptr() + self._first_row * row_bytes
            binding.bind_input(slot.past, device, 0, dtype, shape, address)
            binding.bind_output(slot.present, device, 0, dtype, shape, address)

    def widest(self, new: int) -> int:
        """How wide a mask may be for `new` tokens a row, as long as nothing moves."""
        return min(self.capacity - max(0, _LEAST - new), self.layout.context)

    def advance(self, binding: Any, new: int) -> None:  # noqa: ARG002 - it was written in place
        self.lengths += new

    def rollback(self, lengths: Sequence[int] | NDArray[np.int64]) -> None:
        self.lengths = np.minimum(self.lengths, lengths)

    def select(self, rows: Sequence[int]) -> None:
        self.lengths = self.lengths[list(rows)]
        self._move(list(rows), self.capacity, len(rows))

    def split(self, counts: Sequence[int]) -> list[Self]:
        self._reserve(int((self.lengths + np.maximum(counts, _LEAST)).max()))
        return [self._row(row) for row in range(self.batch)]

    def join(self, rows: Sequence[Self]) -> None:
        self.lengths = np.concatenate([row.lengths for row in rows])

    def append(self, row: Self) -> None:
        batch, length = self.batch, int(row.lengths[0])
        most = max(length, int(self.lengths.max(initial=0)))
        if batch == self._rows or most > self.capacity:
            capacity = self.capacity if most <= self.capacity else self._capacity_for(most)
            self._move(list(range(batch)), capacity, max(1, 2 * batch) if batch == self._rows else self._rows)
        arrays = self._hosts()
        for mine, other in zip(arrays, row._hosts(), strict=True):
            mine[batch, :, :length] = other[row._first_row, :, :length]
        self._place(arrays)
        self.lengths = np.append(self.lengths, length)

    def drop(self, row: int) -> None:
        last = self.batch - 1
        if row < last:
            length = int(self.lengths[last])
            arrays = self._hosts()
            for mine in arrays:
                mine[row, :, :length] = mine[last, :, :length]
            self._place(arrays)
            self.lengths[row] = length
        self.lengths = self.lengths[:last].copy()

    def state(self, length: int) -> list[NDArray[Any]]:
        return [array[self._first_row, :, :length] for array in self._hosts()]

    @classmethod
    def holding(cls, layout: CacheLayout, state: Sequence[NDArray[Any]]) -> Self:
        made, length = cls(layout, 1), state[0].shape[1]
        made._reserve(length)
        arrays = made._hosts()
        for mine, other in zip(arrays, state, strict=True):
            mine[0, :, :length] = other
        made._place(arrays)
        made.lengths[0] = length
        return made

    @property
    def bytes(self) -> int:
        each = self._rows * self.capacity * self.layout.dtype.itemsize
        return each * sum(slot.heads * slot.head_size for slot in self.layout.slots)

    def free(self) -> None:
        self._rows, self._arrays, self._buffers, self.capacity = 0, [], [], 0
        self.calls = {}

    def _row(self, row: int) -> Self:
        view = type(self)(self.layout, 1)
        view.lengths = self.lengths[row : row + 1].copy()
        view.capacity, view._buffers, view._first_row = self.capacity, list(self._buffers), row
        view._rows = 1
        return view

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        self._move(list(range(self.batch)), self._capacity_for(tokens), max(self._rows, self.batch))

    def _capacity_for(self, tokens: int) -> int:
        capacity = max(self.capacity, FIRST_CAPACITY)
        while capacity < tokens:
            capacity *= 2
        return min(capacity, self.layout.context + 1)

    def _move(self, rows: list[int], capacity: int, room: int) -> None:
        """Copy `rows` into new buffers of `capacity` for `room` rows, through the host: it happens seldom."""
        used = int(self.lengths.max(initial=0))
        held = self._hosts() if used else []
        fresh = []
        for index, slot in enumerate(self.layout.slots):
            array = np.zeros((room, slot.heads, capacity, slot.head_size), self.layout.dtype)
            if used:
                array[: len(rows), :, :used] = held[index][rows, :, :used]
            fresh.append(array)
        self._rows, self.capacity = room, capacity
        self._place(fresh)

    def _hosts(self) -> list[NDArray[Any]]:
        """What the buffers hold: on the CPU they themselves, elsewhere copies, which `_place` puts back."""
        with exclusive(self.layout.provider):
            return self._arrays or [buffer.numpy() for buffer in self._buffers]

    def _place(self, arrays: list[NDArray[Any]]) -> None:
        """Let arrays be the buffers, or their content."""
        if arrays is self._arrays:  # changed in place
            return
        self._arrays = arrays if self.layout.provider.device == "cpu" else []
        self._buffers = [place(array, self.layout.provider) for array in arrays]
        self.calls = {}


class GrowingCache(KVCache):
    """Each call returns new tensors, the past with the new tokens appended, and they are the next call's past.

    Rows are aligned at their end: row b's tokens fill the last length_b of all places. So every row is without gaps,
    and attention windows that are counted in places stay exact.
    """

    keeps_bindings = False

    def __init__(self, layout: CacheLayout, batch: int) -> None:
        super().__init__(layout, batch)
        self._tensors: list[Any] = []

    def reads_together(self, counts: Sequence[int]) -> bool:
        return max(counts) == min(counts)

    def mask(self, new: int) -> NDArray[np.int64]:
        places = int(self.lengths.max())
        past = np.arange(places) >= places - self.lengths[:, None]
        return np.pad(past, ((0, 0), (0, new)), constant_values=True).astype(np.int64)

    def reserve(self, new: int) -> None:  # noqa: ARG002 - ONNX Runtime makes room
        if not self._tensors:
            self._replace([self._blank(slot, self.batch, 0) for slot in self.layout.slots])

    def bind(self, binding: Any) -> None:
        for slot, tensor in zip(self.layout.slots, self._tensors, strict=True):
            binding.bind_ortvalue_input(slot.past, tensor)
            binding.bind_output(slot.present, self.layout.provider.device, 0)

    def advance(self, binding: Any, new: int) -> None:
        _, *self._tensors = binding.get_outputs()  # in the order of binding: the logits, then the slots
        self.lengths += new

    def rollback(self, lengths: Sequence[int] | NDArray[np.int64]) -> None:
        shorter = np.minimum(self.lengths, lengths)
        dropped = self.lengths - shorter
        if dropped.any():
            end = int(self.lengths.max())
            host = self._host()
            self._stack([[h[b : b + 1, :, : end - dropped[b]] for h in host] for b in range(self.batch)], shorter)

    def select(self, rows: Sequence[int]) -> None:
        host = self._host()
        self._stack([[h[b : b + 1] for h in host] for b in rows], self.lengths[list(rows)])

    def split(self, counts: Sequence[int]) -> list[Self]:  # noqa: ARG002 - ONNX Runtime makes room
        host = self._host()
        rows = []
        for b in range(self.batch):
            row = type(self)(self.layout, 1)
            row._stack([[h[b : b + 1] for h in host]], self.lengths[b : b + 1].copy())
            rows.append(row)
        return rows

    def append(self, row: Self) -> None:
        rows = [[h[b : b + 1] for h in self._host()] for b in range(self.batch)]
        self._stack([*rows, row._host()], np.append(self.lengths, row.lengths))

    def drop(self, row: int) -> None:
        last = self.batch - 1
        self.select([last if b == row else b for b in range(last)])

    def join(self, rows: Sequence[Self]) -> None:
        self._stack([row._host() for row in rows], np.concatenate([row.lengths for row in rows]))

    def state(self, length: int) -> list[NDArray[Any]]:
        return [array[0, :, :length] for array in self._host()]

    @classmethod
    def holding(cls, layout: CacheLayout, state: Sequence[NDArray[Any]]) -> Self:
        made = cls(layout, 1)
        made._stack([[part[None] for part in state]], np.array([state[0].shape[1]]))
        return made

    @property
    def bytes(self) -> int:
        each = self.batch * int(self.lengths.max(initial=0)) * self.layout.dtype.itemsize
        return each * sum(slot.heads * slot.head_size for slot in self.layout.slots)

    def free(self) -> None:
        self._tensors, self.calls = [], {}

    def _host(self) -> list[NDArray[Any]]:
        if not self._tensors:
            return [self._blank(slot, self.batch, 0) for slot in self.layout.slots]
        return [tensor.numpy() for tensor in self._tensors]

    def _stack(self, rows: Sequence[Sequence[NDArray[Any]]], lengths: NDArray[np.int64]) -> None:
        """Replace the state by `rows`: for each, its slots [1, heads, places, head_size] that end with its tokens."""
        places = int(lengths.max(initial=0))
        stacked = [self._blank(slot, len(rows), places) for slot in self.layout.slots]
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for target, source in zip(stacked, row, strict=True):
                target[b, :, places - length :] = source[0, :, source.shape[2] - length :]
        self.lengths = lengths
        self._replace(stacked)

    def _replace(self, arrays: Sequence[NDArray[Any]]) -> None:
        self._tensors = [place(array, self.layout.provider) for array in arrays]

    def _blank(self, slot: Slot, batch: int, places: int) -> NDArray[Any]:
        return np.zeros((batch, slot.heads, places, slot.head_size), self.layout.dtype)


KINDS: dict[str, type[KVCache]] = {"shared": SharedCache, "growing": GrowingCache}
