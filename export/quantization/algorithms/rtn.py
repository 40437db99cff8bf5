"""Round to nearest: every block's range is divided evenly, without looking at data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemix.export.quantization.algorithms.blocks import Blocks, Half, cut

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgemix.export.graphs.weights import Matrix


def rtn(weight: Matrix, *, bits: int, block: int, symmetric: bool) -> Blocks:
    """Quantize a weight [N, K] to blocks of `block` inputs.

    Symmetric blocks span [-max|w|, max|w|] around the middle code; asymmetric ones span [min(w, 0), max(w, 0)], so that
    zero, and with it the padding, stays exact.
    """
    values = cut(weight, block)
    top = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        scales = half_scales(np.maximum(values.max(-1), -values.min(-1)) / np.float32(middle - 1))
        return Blocks(to_codes(values, scales, np.float32(middle), top), scales, None, bits, weight.shape[1])
    low = np.minimum(values.min(-1), 0)
    scales = half_scales((np.maximum(values.max(-1), 0) - low) / np.float32(top))
    zero_points = np.clip(np.rint(-low / scales.astype(np.float32)), 0, top)
    codes = to_codes(values, scales, zero_points[..., None], top)
    return Blocks(codes, scales, zero_points.astype(np.uint8), bits, weight.shape[1])


def half_scales(scales: Matrix) -> Half:
    """Return scales in half precision, none of them zero: a block of zeros gets 1."""
    tiny = np.finfo(np.float16).smallest_subnormal
    return np.where(scales > 0, np.maximum(scales.astype(np.float16), tiny), np.float16(1))


def to_codes(values: Matrix, scales: Half, zero_points: Matrix | np.float32, top: int) -> NDArray[np.uint8]:
    """Return the uint8 codes [N, blocks, block] nearest to values / scales + zero_points, within 0..top."""
    codes = values / scales[..., None].astype(np.float32)
    codes += zero_points
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    return codes.astype(np.uint8)
