"""The n-grams of a bundle's training text, which predict the next token of a text, for drafts without a model.

A file of `ROW` bytes an n-gram, in three columns, one after the other, little-endian: the hash of its tokens (uint64,
ascending), the token that follows it most often (uint32), and how often, as a share of 255 (uint8).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.errors import EXPORT_AGAIN, BundleError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

LONGEST = 4
"""Tokens of the longest n-grams."""
ROW = 13
"""Bytes of an n-gram."""

_FACTOR = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1


class Guess(NamedTuple):
    """A token that may follow a text, and in what share of the texts that ended alike it did."""

    token: int
    share: float


class NgramTable:
    """n-grams and the token that follows each most often.

    Args:
        keys: uint64 [n-grams], ascending: their hashes.
        tokens: uint32 [n-grams], what follows each.
        shares: uint8 [n-grams], how often it does, of 255.
    """

    def __init__(self, keys: NDArray[np.uint64], tokens: NDArray[np.uint32], shares: NDArray[np.uint8]) -> None:
        self._keys, self._tokens, self._shares = keys, tokens, shares

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def open(cls, path: Path, count: int, vocabulary: int) -> Self:
        """Read a file.

        Args:
            path: The file.
            count: How many n-grams it has, as its bundle says.
            vocabulary: Number of token ids.

        Raises:
            BundleError: It is not of that many, or names tokens that there are not.
        """
        with storage_errors(f"reading {path}"), path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != count * ROW or not count:
                raise BundleError(f"{path} has {size:,} bytes, and should have {count:,} n-grams", EXPORT_AGAIN)
            content = file.read(size)
        tokens = np.frombuffer(content, "<u4", count, 8 * count)
        if int(tokens.max()) >= vocabulary:
            raise BundleError(f"{path} has a token beyond the {vocabulary:,} of the tokenizer", EXPORT_AGAIN)
        return cls(np.frombuffer(content, "<u8", count), tokens, np.frombuffer(content, "u1", count, 12 * count))

    def to_bytes(self) -> bytes:
        """The file's content."""
        columns = ((self._keys, "<u8"), (self._tokens, "<u4"), (self._shares, "u1"))
        return b"".join(column.astype(kind).tobytes() for column, kind in columns)

    def guess(self, text: Sequence[int]) -> Guess | None:
        """Return the token after the longest known n-gram that a text ends with; None if it ends with none."""
        found, key = None, 0
        for token in reversed(text[-LONGEST:]):
            key = (key * _FACTOR + token + 1) & _ALL
            place = int(self._keys.searchsorted(np.uint64(key)))
            if place < len(self._keys) and int(self._keys[place]) == key:
                found = place
        return None if found is None else Guess(int(self._tokens[found]), int(self._shares[found]) / 255)


def longer(keys: NDArray[np.uint64], tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hashes of n-grams with another token before each: uint64 [n-grams]; those of nothing are zeros."""
    return keys * np.uint64(_FACTOR) + tokens.astype(np.uint64) + np.uint64(1)
