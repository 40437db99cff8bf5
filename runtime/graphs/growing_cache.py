"""Key-value state that is new tensors after each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edgemix.runtime.graphs.kv_cache import CacheLayout, KVCache, Slot
from edgemix.runtime.graphs.providers import exclusive, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class GrowingCache(KVCache):
    """Each call returns new tensors, the past with the new tokens appended, which are the next call's past.

    Rows are aligned at their end: row b's tokens fill the last length_b positions. So every row is without gaps, and
    attention windows that are counted in positions stay exact.
    """

    keeps_bindings = False

    def __init__(self, layout: CacheLayout, batch: int) -> None:
        super().__init__(layout, batch)
        self._tensors: list[Any] = []

    def reads_together(self, counts: Sequence[int]) -> bool:
        return max(counts) == min(counts)

    def mask(self, new: int) -> NDArray[np.int64]:
        places = self.longest
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
            end = self.longest
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
        each = self.batch * self.longest * self.layout.dtype.itemsize
        return each * sum(slot.heads * slot.head_size for slot in self.layout.slots)

    def free(self) -> None:
        self._tensors, self.calls = [], {}

    def _host(self) -> list[NDArray[Any]]:
        if not self._tensors:
            return [self._blank(slot, self.batch, 0) for slot in self.layout.slots]
        with exclusive(self.layout.provider):
            return [tensor.numpy() for tensor in self._tensors]

    def _stack(self, rows: Sequence[Sequence[NDArray[Any]]], lengths: NDArray[np.int64]) -> None:
        """Replace the state by `rows`: for each, its slots [1, heads, positions, head_size] ending with its tokens."""
        places = int(lengths.max(initial=0))
        stacked = [self._blank(slot, len(rows), places) for slot in self.layout.slots]
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for target, source in zip(stacked, row, strict=True):
                target[b, :, places - length :] = source[0, :, source.shape[2] - length :]
        self._replace(stacked)
        self.lengths = lengths

    def _replace(self, arrays: Sequence[NDArray[Any]]) -> None:
        self._tensors = [place(array, self.layout.provider) for array in arrays]

    def _blank(self, slot: Slot, batch: int, places: int) -> NDArray[Any]:
        return np.zeros((batch, slot.heads, places, slot.head_size), self.layout.dtype)
