"""The blocks of a GGUF file as they are: repacked, not rounded again.

    Q4_0   w = (q - 8) d     4 bits, no zero points
    Q4_1   w = q d + m       4 bits, zero points z = round(-m / d), and what they leave of the minimum:  r = m + z d
    Q8_0   w = q d           8 bits, codes q + 128

ONNX Runtime's fast kernels take whole zero points only (with others a product is 30 times slower), and r, up to half a
step for all weights of a block alike, is what plain rounding of a Q4_1 file loses. For a row, with b for its blocks,

    y = sum_k w_k x_k = sum_b [ d_b sum_{k in b} (q_k - z_b) x_k  +  r_b sum_{k in b} x_k ],

so the r are columns of their own in 4-bit blocks (see `Blocks.sums`) and the sums of x are their inputs.

Measured on SmolLM2-135M (Q4_1, its embedding Q8_0), WikiText-2 test: fp32 26.92, rounded again 33.51, repacked 26.99;
with activations in float, 26.93. The graph has 100 MB (94 rounded) and runs at 0.90 of the rounded one's decoding rate,
0.98 of its prefill, 1.0 of its reading of 8 tokens. Exact r, as a float product of the sums that is added to every
linear's, reach no better perplexity (27.02) and decode 2% slower.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgemix.errors import InputError
from edgemix.export.models.gguf_header import gguf_header
from edgemix.export.models.location import reading
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.blocks import Blocks, cut
from edgemix.export.quantization.algorithms.rtn import rtn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from edgemix.export.graphs.weights import Matrix
    from edgemix.export.models.location import Location
    from edgemix.export.quantization.algorithms.blocks import Half

_BLOCK = 32


def gguf_blocks(location: Location, bits: Literal[4, 8]) -> BlockTable:
    """Return the blocks of a GGUF file's Q4_0, Q4_1 and Q8_0 matrices, found by their dequantized float32 rows.

    Args:
        location: The file.
        bits: Bits of the format. A format of 8 bits keeps the file's 8-bit matrices; one of 4 bits keeps the 4-bit ones
            and, beside them, those to which the file gave 8, but nothing of a file that has 8-bit matrices only.

    Raises:
        InputError: The file cannot be read, or it has a weight that is not finite.
    """
    from gguf import GGUFReader, dequantize

    table = BlockTable()
    gguf_header(location)  # gguf's own reader trusts what a file says of itself
    with reading(location):
        tensors = [
            tensor
            for tensor in GGUFReader(location.folder / str(location.gguf)).tensors
            if tensor.tensor_type.name in _KINDS and tensor.data.ndim > 1 and tensor.data.size
        ]
        kinds = {tensor.tensor_type.name for tensor in tensors}
        kept = {"Q8_0"} if bits == 8 else kinds if kinds - {"Q8_0"} else set()
        for tensor in tensors:
            if tensor.tensor_type.name not in kept:
                continue
            matrix = dequantize(tensor.data, tensor.tensor_type)
            if not np.isfinite(matrix).all():
                raise InputError(f"{location.name}: {tensor.name} has weights that are not finite")
            columns = matrix.shape[-1]
            stored = np.ascontiguousarray(tensor.data).reshape(matrix.size // columns, columns // _BLOCK, -1)
            table.add(matrix.reshape(-1, columns), _KINDS[tensor.tensor_type.name](stored))
    return table


def _q4_0(stored: NDArray[np.uint8]) -> Blocks:
    return _blocks(_nibbles(stored[..., 2:]), _half(stored[..., :2]), None, 4)


def _q4_1(stored: NDArray[np.uint8]) -> Blocks:
    scales, minima = _half(stored[..., :2]), _half(stored[..., 2:4]).astype(np.float32)
    steps = scales.astype(np.float32)
    zero = np.clip(np.rint(-minima / np.where(steps == 0, np.float32(np.inf), steps)), 0, 15).astype(np.uint8)
    blocks = _blocks(_nibbles(stored[..., 4:]), scales, zero, 4)
    rest = minima + zero * steps
    if not rest.any():
        return blocks
    behind = rtn(_filled(rest), bits=4, block=_BLOCK, symmetric=False)
    return replace(
        blocks,
        codes=np.concatenate([blocks.codes, behind.codes], axis=1),
        scales=np.concatenate([blocks.scales, behind.scales], axis=1),
        zero_points=np.concatenate([zero, behind.zero_points], axis=1),
        sums=rest.shape[1],
    )


def _filled(rest: Matrix) -> Matrix:
    """Append zeros where they make products faster: ONNX Runtime's kernels take four blocks of a row at a time, and
    each remaining block costs as much as four.
    """
    blocks = -(-rest.shape[1] // _BLOCK)
    if rest.shape[1] % 8 and (rest.shape[1] + blocks) % 4 == 3:
        blocks += 1
    return cut(rest, blocks * _BLOCK)[:, 0]


def _q8_0(stored: NDArray[np.uint8]) -> Blocks:
    return _blocks(stored[..., 2:] ^ np.uint8(128), _half(stored[..., :2]), None, 8)


_KINDS: Mapping[str, Callable[[NDArray[np.uint8]], Blocks]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
"""GGUF type -> function that repacks uint8 [N, K / 32, bytes of a block]; all types have blocks of 32."""


def _blocks(codes: NDArray[np.uint8], scales: Half, zero_points: NDArray[np.uint8] | None, bits: int) -> Blocks:
    """Return blocks without zero scales: blocks of zeros get the scale 1."""
    zeros = np.uint8(2 ** (bits - 1)) if zero_points is None else zero_points[..., None]
    codes = np.where(scales[..., None] == 0, zeros, codes)
    scales = np.where(scales == 0, np.float16(1), scales)
    return Blocks(codes, scales, zero_points, bits, codes.shape[1] * _BLOCK)


def _half(stored: NDArray[np.uint8]) -> Half:
    """Return float16 [...] from bytes [..., 2]."""
    return np.ascontiguousarray(stored).view("<f2")[..., 0]


def _nibbles(stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8 codes [..., 32] from bytes [..., 16]; the lower halves come first."""
    return np.concatenate([stored & np.uint8(15), stored >> np.uint8(4)], axis=-1)
