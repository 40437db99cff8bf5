"""Half-quadratic quantization (Badri and Shaji, mobiusml.github.io/hqq_blog): blocks that ignore their outliers.

Minimizes sum |W - dequantized(W)|^p, p < 1, over a block's zero point and scale: the residual is shrunk (the proximal
step of |x|^p), what remains is explained by least squares. Unlike the original, zero points are whole codes (ONNX
Runtime's fast kernels take no others; with fractional ones decoding is several times slower), so scales move too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemix.export.quantization.algorithms.blocks import Blocks, cut
from edgemix.export.quantization.algorithms.rtn import half_scales, rtn, to_codes

if TYPE_CHECKING:
    from edgemix.export.graphs.weights import Matrix

_P = 0.7
_BETA, _GROWTH, _ITERATIONS = 10.0, 1.01, 20


def hqq(weight: Matrix, *, bits: int, block: int) -> Blocks:
    """Quantize a weight [N, K] to asymmetric blocks of `block` inputs, starting from round-to-nearest's.

    Every block keeps the least sum of |error|^p met on the way, so none is worse than it started.
    """
    values = cut(weight, block)
    top = 2**bits - 1
    start = rtn(weight, bits=bits, block=block, symmetric=False)
    codes, scales = start.codes, start.scales
    zeros = np.asarray(start.zero_points, np.float32)
    best_codes, best_scales, best_zeros = codes.copy(), scales.copy(), zeros.copy()
    least = np.full(scales.shape, np.inf, np.float32)
    beta = _BETA
    for _ in range(_ITERATIONS):
        codes = to_codes(values, scales, zeros[..., None], top)
        wide = scales[..., None].astype(np.float32)
        levels = codes - zeros[..., None]
        errors = values / wide - levels  # in steps of a code, so that beta means the same for every weight
        cost = (np.abs(errors * wide) ** _P).sum(-1)
        better = cost < least
        least[better] = cost[better]
        best_codes[better], best_scales[better], best_zeros[better] = codes[better], scales[better], zeros[better]
        target = values - _shrink(errors, beta) * wide
        zeros = np.clip(np.rint((codes - target / wide).mean(-1)), 0, top)
        levels = codes - zeros[..., None]
        fit = (levels * target).sum(-1) / np.maximum((levels * levels).sum(-1), 1)
        scales = half_scales(np.abs(fit))
        beta *= _GROWTH
    return Blocks(best_codes, best_scales, best_zeros.astype(np.uint8), bits, weight.shape[1])


def _shrink(errors: Matrix, beta: float) -> Matrix:
    """The proximal step of |x|^p: small errors vanish, large ones stay almost whole."""
    magnitude = np.abs(errors)
    return np.sign(errors) * np.maximum(magnitude - (magnitude + 1e-8) ** (_P - 1) / beta, 0)
