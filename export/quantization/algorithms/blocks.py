"""Block-quantized matrices, which every integer algorithm computes and the graph stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemix.export.graphs.weights import Matrix

Half: TypeAlias = NDArray[np.float16]


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] (outputs, inputs) cut along K into blocks, the last one padded where `block` does not divide K.

    weight[n, b * block + j] = (codes[n, b, j] - zero_points[n, b]) * scales[n, b]

    Behind them there may be columns for the sums of each block's inputs, in blocks of their own. They hold an offset
    that all weights of a block share and no whole zero point can express: a minimum that is no multiple of the scale.

    Attributes:
        codes: uint8 [N, blocks, block], one code a byte, each below 2**bits; the blocks of K come first.
        scales: float16 [N, blocks], as GGUF's formats have them: half the size, and exact enough for 8-bit codes.
        zero_points: uint8 [N, blocks]; None means 2**(bits - 1) everywhere, which is then not stored.
        bits: 4 or 8.
        columns: K.
        sums: Columns for the sums of blocks: K / block, or 0.
    """

    codes: NDArray[np.uint8]
    scales: Half
    zero_points: NDArray[np.uint8] | None
    bits: int
    columns: int
    sums: int = 0

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return int(self.codes.shape[2])

    @property
    def inputs(self) -> int:
        """Inputs of the stored product: K and the sums, padded to whole blocks unless the sums are a multiple of 8, as
        CUDA's kernels require.
        """
        return self.codes.shape[1] * self.block if self.sums % 8 else self.columns + self.sums

    def dequantized(self) -> Matrix:
        """Return the float matrix [N, K] of the blocks."""
        zero = np.float32(2 ** (self.bits - 1)) if self.zero_points is None else self.zero_points[..., None]
        values = (self.codes.astype(np.float32) - zero) * self.scales[..., None].astype(np.float32)
        flat = values.reshape(len(values), -1)
        weight, rest = flat[:, : self.columns], flat[:, self.columns : self.columns + self.sums]
        return np.ascontiguousarray(weight + np.repeat(rest, self.block, axis=1) if self.sums else weight)

    def widened(self) -> Blocks:
        """Return the same weights in 8 bits: 4-bit codes around the middle of 8 bits; 8-bit blocks as they are."""
        if self.bits == 8:
            return self
        zero = np.uint8(8) if self.zero_points is None else self.zero_points[..., None]
        return replace(self, codes=self.codes + np.uint8(128) - zero, zero_points=None, bits=8)

    def rows(self, chosen: NDArray[np.int64]) -> Blocks:
        """Return some of the rows, in the given order."""
        zero_points = None if self.zero_points is None else self.zero_points[chosen]
        return replace(self, codes=self.codes[chosen], scales=self.scales[chosen], zero_points=zero_points)

    def packed_codes(self) -> NDArray[np.uint8]:
        """Return uint8 [N, blocks, block * bits / 8], the lower bits first, as MatMulNBits reads them."""
        return _pack(self.codes, self.bits)

    def packed_zero_points(self) -> NDArray[np.uint8] | None:
        """Return uint8 [N, ceil(blocks * bits / 8)], the lower bits first."""
        return None if self.zero_points is None else _pack(self.zero_points, self.bits)


Quantizer: TypeAlias = Callable[[Matrix], Blocks]
"""An algorithm with its options bound: a float32 weight [N, K] in, its blocks out."""


def concatenate(parts: Sequence[Blocks]) -> Blocks:
    """Concatenate matrices of equal columns and blocks by rows, with the bits of the widest; the weights stay."""
    if len({part.sums for part in parts}) > 1:
        wide = next(part for part in parts if part.sums)
        parts = [_with_sums(part, wide) for part in parts]
    if len({part.bits for part in parts}) > 1:
        parts = [part.widened() for part in parts]
    zero_points = None
    if any(part.zero_points is not None for part in parts):
        zero_points = np.concatenate([_zero_points(part) for part in parts])
    codes, scales = (np.concatenate([getattr(part, kind) for part in parts]) for kind in ("codes", "scales"))
    return replace(parts[0], codes=codes, scales=scales, zero_points=zero_points)


def cut(weight: Matrix, block: int) -> Matrix:
    """Reshape a weight [N, K] to [N, blocks, block], padded with zeros."""
    rows, columns = weight.shape
    padding = -columns % block
    padded = np.pad(weight, ((0, 0), (0, padding))) if padding else weight
    return padded.reshape(rows, -1, block)


def _with_sums(blocks: Blocks, wide: Blocks) -> Blocks:
    """Return the same weights with columns of zeros for sums, as other blocks have them."""
    if blocks.sums:
        return blocks
    middle = 2 ** (blocks.bits - 1)
    behind = (0, 0), (0, wide.codes.shape[1] - blocks.codes.shape[1])
    return replace(
        blocks,
        codes=np.pad(blocks.codes, (*behind, (0, 0)), constant_values=middle),
        scales=np.pad(blocks.scales, behind, constant_values=1),
        zero_points=np.pad(_zero_points(blocks), behind, constant_values=middle),
        sums=wide.sums,
    )


def _zero_points(blocks: Blocks) -> NDArray[np.uint8]:
    if blocks.zero_points is not None:
        return blocks.zero_points
    return np.full(blocks.scales.shape, 2 ** (blocks.bits - 1), np.uint8)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))
