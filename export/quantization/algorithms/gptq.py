"""GPTQ: each rounding error is compensated by the weights that are rounded after it, as far as the inputs allow.

With H = 2/n sum x x^T over calibration inputs, the blocks minimize the squared error of a linear's outputs,

    sum over rows of (w - q) H (w - q)^T,

greedily, column by column (Frantar et al., arXiv 2210.17323). Columns are taken in the order of H's diagonal, while
blocks stay where they are and have their scales and zero points before the first column is rounded: the graph needs no
index. What the greedy pass leaves is refined by coordinate descent over the codes (QuantEase, Behdin et al., arXiv
2309.01885) and by the least-squares scales for given codes, in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemix.export.quantization.algorithms.blocks import Blocks

if TYPE_CHECKING:
    from torch import Tensor

    from edgemix.export.graphs.weights import Matrix

DAMPING = 0.05
"""Added to H's diagonal, as a share of its mean. With weighted tokens, 0.05 measured better than 0.01 and 0.1."""

_RATIOS = tuple(1 - 0.04 * step for step in range(13))
"""Shares of a block's range that are tried as scales."""

_LAZY = 128
"""Columns whose errors are gathered before all columns behind them change: a matrix product instead of vectors'."""

_TINY = 2.0**-24
"""The smallest half-precision number."""


def gptq(
    weight: Tensor | Matrix,
    hessian: Tensor | Matrix,
    *,
    bits: int,
    block: int,
    sweeps: int = 2,
) -> Blocks:
    """Quantize a weight [N, K] for inputs with the Hessian [K, K].

    Args:
        weight: fp32.
        hessian: As `calibration.Statistics` has it. Inputs that were never other than zero are rounded to nearest.
        bits: 4 or 8.
        block: Inputs that share a scale; need not divide K.
        sweeps: Rounds of refinement.

    Returns:
        The blocks; no row has a larger error than rounding to nearest on the same scales leaves. A weight that is zero,
        as pruning made it, stays zero.
    """
    grid = _Grid(torch.as_tensor(weight).float(), bits, block)
    damped = _damped(torch.as_tensor(hessian).to(grid.weight))
    grid.search(damped.diagonal())
    codes = grid.round(grid.weight)
    _take_better(grid, codes, _greedy(grid, damped), damped)
    for _ in range(sweeps):
        _descend(grid, codes, damped)
    return grid.blocks(codes)


class _Grid:
    """The values that a weight's blocks can represent.

    Attributes:
        weight: [N, K].
        block: Columns that share a scale.
        top: The largest code.
        block_scales: [N, blocks], exact in half precision.
        block_zero: [N, blocks], whole numbers in 0..top.
        scales, zero: The same for each weight, [N, K].
    """

    def __init__(self, weight: Tensor, bits: int, block: int) -> None:
        self.weight, self._bits, self.block = weight, bits, block
        self.top = 2**bits - 1
        self.count = -(-weight.shape[1] // block)
        self.set(torch.ones(len(weight), self.count), torch.zeros(len(weight), self.count))

    def set(self, scales: Tensor, zero: Tensor) -> None:
        self.block_scales, self.block_zero = scales.to(self.weight), zero.to(self.weight)
        self.scales, self.zero = self._spread(self.block_scales), self._spread(self.block_zero)

    def _spread(self, values: Tensor) -> Tensor:
        """Expand [N, blocks] to [N, K]."""
        return values.repeat_interleave(self.block, 1)[:, : self.weight.shape[1]].contiguous()

    def round(self, values: Tensor) -> Tensor:
        """Return the codes nearest to values [N, K], as floats."""
        return (values / self.scales).add_(self.zero).round_().clamp_(0, self.top)

    def values(self, codes: Tensor) -> Tensor:
        """Return the values of codes [N, K]."""
        return (codes - self.zero).mul_(self.scales)

    def search(self, importance: Tensor) -> None:
        """Find the scales and zero points with the least sum of importance [K] times squared rounding error."""
        padding = (0, self.count * self.block - self.weight.shape[1])
        cut = torch.nn.functional.pad(self.weight, padding).unflatten(1, (self.count, self.block))
        share = torch.nn.functional.pad(importance, padding).unflatten(0, (self.count, self.block))
        high, low = cut.amax(2).clamp(min=0), cut.amin(2).clamp(max=0)  # zero, and with it the padding, stays exact
        least = torch.full_like(high, torch.inf)
        best, best_zero = torch.ones_like(high), torch.full_like(high, 2 ** (self._bits - 1))
        for ratio in _RATIOS:
            scales = _half((high - low) * ratio / self.top)
            zero = (-low * ratio / scales).round_().clamp_(0, self.top)
            codes = (cut / scales[..., None]).add_(zero[..., None]).round_().clamp_(0, self.top)
            errors = codes.sub_(zero[..., None]).mul_(scales[..., None]).sub_(cut).square_().mul_(share).sum(2)
            better = errors < least
            least, best = torch.where(better, errors, least), torch.where(better, scales, best)
            best_zero = torch.where(better, zero, best_zero)
        self.set(best, best_zero)

    def blocks(self, codes: Tensor) -> Blocks:
        """Return the blocks with the codes [N, K]; padding has the code of zero."""
        padded = self.block_zero.repeat_interleave(self.block, 1)
        padded[:, : codes.shape[1]] = codes
        stored = padded.unflatten(1, (self.count, self.block)).to(torch.uint8).cpu().numpy()
        zero = self.block_zero.to(torch.uint8).cpu().numpy()
        return Blocks(stored, self.block_scales.half().cpu().numpy(), zero, self._bits, codes.shape[1])


def _greedy(grid: _Grid, hessian: Tensor) -> Tensor:
    """Compute the codes [N, K] of the greedy pass."""
    order = hessian.diagonal().argsort(descending=True)
    upper = _inverse_factor(hessian[order][:, order])
    weight = grid.weight[:, order]
    alive = (weight != 0).T.contiguous()
    scales, zero = grid.scales[:, order].T.contiguous(), grid.zero[:, order].T.contiguous()
    codes = torch.empty_like(scales)  # [K, N]: a column at a time is read and written
    for start in range(0, len(order), _LAZY):
        end = min(start + _LAZY, len(order))
        part = weight[:, start:end].T.contiguous()
        errors = torch.empty_like(part)
        for index in range(end - start):
            at = start + index
            value = part[index]
            code = (value / scales[at]).add_(zero[at]).round_().clamp_(0, grid.top)
            codes[at] = torch.where(alive[at], code, zero[at])
            errors[index] = (value - (codes[at] - zero[at]) * scales[at]) / upper[at, at]
            part[index + 1 :].addr_(upper[at, at + 1 : end], errors[index], alpha=-1)
        weight[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    return codes[order.argsort()].T.contiguous()


def _descend(grid: _Grid, codes: Tensor, hessian: Tensor) -> None:
    """One pass over the codes [N, K] and the scales, in place: each takes the value that is best with all others as
    they are.

    With the error e = q - w of a row and its slope e H, a change d of q changes the loss by 2 d (e H)^T + d H d^T.
    """
    columns, weight = codes.T.contiguous(), grid.weight.T
    alive = (weight != 0).to(weight)
    scales, zero = grid.block_scales.T.contiguous(), grid.block_zero.T
    levels = columns - zero.repeat_interleave(grid.block, 0)[: len(columns)]
    values = levels * scales.repeat_interleave(grid.block, 0)[: len(columns)]
    slope = hessian @ (values - weight)
    panel = max(1, _LAZY // grid.block) * grid.block
    for start in range(0, len(columns), panel):
        end = min(start + panel, len(columns))
        before = values[start:end].clone()
        for low in range(start, end, grid.block):
            high, at = min(low + grid.block, end), low // grid.block
            for index in range(low, high):
                wanted = values[index] - slope[index] / hessian[index, index]
                level = (wanted / scales[at]).round_()
                level = torch.minimum(torch.maximum(level, -zero[at]), grid.top - zero[at]) * alive[index]
                value = level * scales[at]
                slope[start:end].addr_(hessian[index, start:end], value - values[index])
                levels[index], values[index] = level, value
            part = levels[low:high]
            curvature = (part * (hessian[low:high, low:high] @ part)).sum(0)
            descent = (part * slope[low:high]).sum(0)
            fitted = _half(scales[at] - descent / curvature.clamp(min=_TINY))
            step = fitted - scales[at]
            better = (2 * step * descent + step * step * curvature < 0) & (curvature > 0)
            step = torch.where(better, step, 0)
            scales[at] += step
            moved = part * step
            values[low:high] += moved
            slope[start:end].addmm_(hessian[start:end, low:high], moved)
        slope[end:].addmm_(hessian[end:, start:end], values[start:end] - before)
    codes.copy_(levels.T + grid.zero)
    grid.set(scales.T, grid.block_zero)


def _take_better(grid: _Grid, codes: Tensor, others: Tensor, hessian: Tensor) -> None:
    """Replace the rows of codes [N, K] that have a larger error than those of others."""
    own, other = (_errors(grid.weight - grid.values(each), hessian) for each in (codes, others))
    better = other < own
    codes[better] = others[better]


def _errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """[N, K] -> [N]."""
    return (difference @ hessian).mul_(difference).sum(1)


def _damped(hessian: Tensor) -> Tensor:
    """Return H with a larger diagonal; inputs that were always zero get one of their own."""
    diagonal = hessian.diagonal()
    mean = float(diagonal[diagonal > 0].mean()) if bool((diagonal > 0).any()) else 1.0
    added = torch.where(diagonal > 0, DAMPING * mean, mean)
    return hessian + torch.diag(added)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = H^-1."""
    wide = hessian.double()
    extra = float(wide.diagonal().mean()) * 1e-6
    while True:
        lower, failed = torch.linalg.cholesky_ex(wide)
        if not int(failed):
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return inverse.to(hessian)
        wide = wide + extra * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        extra *= 10


def _half(scales: Tensor) -> Tensor:
    """Return scales as they are stored; none is zero."""
    return torch.where(scales > 0, scales.half().float().clamp(min=_TINY), 1.0)
