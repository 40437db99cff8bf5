"""Key-value state in buffers that graphs write in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edgemix.runtime.graphs.kv_cache import CacheLayout, KVCache
from edgemix.runtime.graphs.providers import exclusive, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FIRST_CAPACITY = 128
"""Capacity of a new shared cache, in tokens; it doubles from there."""
_LEAST = 2
"""Tokens that a call writes at least: attention reads a single token doubled."""


class SharedCache(KVCache):
    """One buffer [batch, heads, capacity, head_size] a slot, bound as past and as present and written in place.

    Row b's tokens lie at positions 0..length_b-1. A row is a contiguous part of the buffer, so it can be read into
    alone. The capacity doubles as needed, up to the context; a rollback is only a shorter length.
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
            member_count = self.layout.member_count
            shape = [self.batch * member_count, slot.heads // member_count, self.capacity, slot.head_size]
            row_bytes = slot.heads * self.capacity * slot.head_size * dtype.itemsize
            address = buffer.data_ptr() + self._first_row * row_bytes
            binding.bind_input(slot.past, device, 0, dtype, shape, address)
            binding.bind_output(slot.present, device, 0, dtype, shape, address)

    def widest(self, new: int) -> int:
        """Return the widest mask for `new` tokens a row with which the buffers stay in place."""
        return min(self.capacity - max(0, _LEAST - new), self.layout.context)

    def advance(self, binding: Any, new: int) -> None:  # noqa: ARG002 - it was written in place
        self.lengths += new

    def rollback(self, lengths: Sequence[int] | NDArray[np.int64]) -> None:
        self.lengths = np.minimum(self.lengths, lengths)

    def select(self, rows: Sequence[int]) -> None:
        self.lengths = self.lengths[list(rows)]
        self._move(list(rows), self.capacity, len(rows))

    def split(self, counts: Sequence[int]) -> list[Self]:
        # A row may be read in several calls, the last of which has a single token.
        self._reserve(int((self.lengths + counts).max()) + _LEAST - 1)
        return [self._row(row) for row in range(self.batch)]

    def join(self, rows: Sequence[Self]) -> None:
        self.lengths = np.concatenate([row.lengths for row in rows])

    def reserve_rows(self, rows: int, tokens: int) -> None:
        if rows > self._rows:
            self._move(list(range(self.batch)), self._capacity_for(tokens), rows)

    def append(self, row: Self) -> None:
        batch, length = self.batch, int(row.lengths[0])
        most = max(length, self.longest)
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
        """Copy `rows` into new buffers of `capacity` for `room` rows, through the host; this is rare."""
        used = self.longest
        held = self._hosts() if used else []
        fresh = []
        for index, slot in enumerate(self.layout.slots):
            array = np.zeros((room, slot.heads, capacity, slot.head_size), self.layout.dtype)
            if used:
                array[: len(rows), :, :used] = held[index][rows, :, :used]
            fresh.append(array)
        self._place(fresh)
        self._rows, self.capacity = room, capacity

    def _hosts(self) -> list[NDArray[Any]]:
        """Return the buffers as arrays: on the CPU themselves, elsewhere copies, which `_place` writes back."""
        with exclusive(self.layout.provider):
            return self._arrays or [buffer.numpy() for buffer in self._buffers]

    def _place(self, arrays: list[NDArray[Any]]) -> None:
        """Make arrays the buffers, or write their content to them."""
        if arrays is self._arrays:  # changed in place
            return
        self._buffers = [place(array, self.layout.provider) for array in arrays]
        self._arrays = arrays if self.layout.provider.device == "cpu" else []
        self.calls = {}
