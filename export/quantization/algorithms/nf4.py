"""NF4 (QLoRA, arXiv 2305.14314): 4-bit codes on the quantiles of a normal distribution, by bitsandbytes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemix.export.graphs.weights import Matrix

_BLOCK = 64


@dataclass(frozen=True)
class Nf4:
    """A weight [N, K], flattened row by row and cut into blocks of `block` values that may cross rows.

    Attributes:
        codes: uint8 [ceil(N * K / 2)]; MatMulBnb4 and bitsandbytes both put the first value in the higher four bits.
        maxima: float32 [ceil(N * K / block)], each block's largest magnitude.
        block: Values a block.
    """

    codes: NDArray[np.uint8]
    maxima: Matrix
    block: int


def nf4(weight: Matrix) -> Nf4:
    """Quantize a float32 weight [N, K]."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses a kernel that is not used here
    from bitsandbytes import functional  # slow to import, and no other format needs it

    codes, state = functional.quantize_4bit(torch.tensor(weight), blocksize=_BLOCK, quant_type="nf4")
    return Nf4(codes.numpy().reshape(-1), state.absmax.numpy(), _BLOCK)
