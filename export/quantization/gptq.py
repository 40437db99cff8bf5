"""GPTQ: each rounding error is made up for by the weights that are rounded after it, as far as the inputs allow.

With H = 2/n sum x x^T over calibration inputs, the blocks minimise the squared error of a linear's outputs,

    sum over rows of (w - q) H (w - q)^T,

greedily, column by column (Frantar et al., arXiv 2210.17323). Columns are taken in the order of H's diagonal, while
blocks stay where they are and have their scales and zero points before the first column is rounded: the graph needs no
index. What the greedy pass leaves is refined by coordinate descent over the codes (QuantEase, Behdin et al., arXiv
2309.01885) and by the least-squares scales for given codes, in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemix.export.quantization.blocks import Blocks

if TYPE_CHECKING:
    from torch import Tensor

    from edgemix.export.quantization.blocks import Matrix

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean."""

_RATIOS = tuple(1 - 0.04 * step for step in range(13))
"""Shares of a block's range that scales are tried for."""

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
    symmetric: bool = False,
    damping: float = DAMPING,
    sweeps: int = 4,
) -> Blocks:
    """Quantise a weight [N, K] for inputs with the Hessian [K, K].

    Args:
        weight: fp32.
        hessian: As `calibration.Statistics` has it. Inputs that were never other than zero are rounded to nearest.
        bits: 4 or 8.
        block: Inputs that share a scale; need not divide K.
        symmetric: Whether all zero points are the middle code.
        damping: Trust in the calibration text, the less the larger.
        sweeps: Rounds of refinement.

    Returns:
        The blocks; no row has a larger error than rounding to nearest on the same scales leaves.
    """
    grid = _Grid(torch.as_tensor(weight).float(), bits, block, symmetric=symmetric)
    damped = _damped(torch.as_tensor(hessian).to(grid.weight), damping)
    grid.search(damped.diagonal())
    codes = grid.round(grid.weight)
    _take_better(grid, codes, _greedy(grid, damped), damped)
    for _ in range(sweeps):
        grid.fit_scales(codes, damped)
        _descend(grid, codes, damped)
    return grid.blocks(codes)


class _Grid:
    """The values that a weight's blocks can take.

    Attributes:
        weight: [N, K].
        scales: [N, K], that of each weight's block, exact in half precision.
        zero: [N, K], that of each weight's block.
    """

    def __init__(self, weight: Tensor, bits: int, block: int, *, symmetric: bool) -> None:
        self.weight, self._bits, self._block, self._symmetric = weight, bits, block, symmetric
        self.top = 2**bits - 1
        self.count = -(-weight.shape[1] // block)
        self._set(torch.ones(len(weight), self.count), torch.zeros(len(weight), self.count))

    def _set(self, scales: Tensor, zero: Tensor) -> None:
        self._scales, self._zero = scales.to(self.weight), zero.to(self.weight)
        self.scales, self.zero = self._spread(self._scales), self._spread(self._zero)

    def _spread(self, values: Tensor) -> Tensor:
        """[N, blocks] -> [N, K]."""
        return values.repeat_interleave(self._block, 1)[:, : self.weight.shape[1]].contiguous()

    def round(self, values: Tensor) -> Tensor:
        """The codes nearest to values [N, K], as floats."""
        return (values / self.scales).add_(self.zero).round_().clamp_(0, self.top)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for."""
        return (codes - self.zero).mul_(self.scales)

    def search(self, importance: Tensor) -> None:
        """Scales and zero points with the least sum of importance [K] times squared rounding error."""
        padding = (0, self.count * self._block - self.weight.shape[1])
        cut = torch.nn.functional.pad(self.weight, padding).unflatten(1, (self.count, self._block))
        share = torch.nn.functional.pad(importance, padding).unflatten(0, (self.count, self._block))
        high, low = cut.amax(2).clamp(min=0), cut.amin(2).clamp(max=0)  # zero, and with it the padding, stays exact
        middle = 2 ** (self._bits - 1)
        least = torch.full_like(high, torch.inf)
        best, best_zero = torch.ones_like(high), torch.full_like(high, middle)
        for ratio in _RATIOS:
            if self._symmetric:
                scales = _half(torch.maximum(high, -low) * ratio / (middle - 1))
                zero = torch.full_like(scales, middle)
            else:
                scales = _half((high - low) * ratio / self.top)
                zero = (-low * ratio / scales).round_().clamp_(0, self.top)
            codes = (cut / scales[..., None]).add_(zero[..., None]).round_().clamp_(0, self.top)
            errors = codes.sub_(zero[..., None]).mul_(scales[..., None]).sub_(cut).square_().mul_(share).sum(2)
            better = errors < least
            least, best = torch.where(better, errors, least), torch.where(better, scales, best)
            best_zero = torch.where(better, zero, best_zero)
        self._set(best, best_zero)

    def fit_scales(self, codes: Tensor, hessian: Tensor) -> None:
        """For each row the scales with the least error under H, with codes [N, K] as they are.

        With c_b the codes less the zero point, zero outside block b: sum_b s_b (c_a H c_b^T) = c_a H w^T.
        """
        rows = max(1, (1 << 25) // (self.count * self.weight.shape[1]))
        fitted = self._scales.clone()
        for start in range(0, len(codes), rows):
            part = slice(start, start + rows)
            levels = codes[part] - self.zero[part]
            products = torch.stack(
                [
                    levels[:, at : at + self._block] @ hessian[at : at + self._block]
                    for at in range(0, levels.shape[1], self._block)
                ],
                1,
            )
            normal = self._sums(products * levels[:, None])
            right = self._sums((self.weight[part] @ hessian) * levels)
            # A block of zeros has no scale to fit; it keeps the one it has.
            diagonal = normal.diagonal(dim1=1, dim2=2)
            ridge = diagonal.mean(1, keepdim=True) * 1e-6 + _TINY
            right += ridge * self._scales[part]
            diagonal += ridge
            fitted[part] = torch.linalg.solve(normal, right)
        old, old_errors = self._scales, _errors(self.weight - self.values(codes), hessian)
        self._set(torch.where(fitted > _TINY, _half(fitted), old), self._zero)
        worse = _errors(self.weight - self.values(codes), hessian) > old_errors
        self._set(torch.where(worse[:, None], old, self._scales), self._zero)

    def _sums(self, values: Tensor) -> Tensor:
        """[..., K] -> [..., blocks]."""
        padding = self.count * self._block - values.shape[-1]
        return torch.nn.functional.pad(values, (0, padding)).unflatten(-1, (self.count, self._block)).sum(-1)

    def blocks(self, codes: Tensor) -> Blocks:
        """The blocks with the codes [N, K]; padding has the code of zero."""
        padded = self._zero.repeat_interleave(self._block, 1)
        padded[:, : codes.shape[1]] = codes
        stored = padded.unflatten(1, (self.count, self._block)).to(torch.uint8).cpu().numpy()
        zero = None if self._symmetric else self._zero.to(torch.uint8).cpu().numpy()
        return Blocks(stored, self._scales.half().cpu().numpy(), zero, self._bits, codes.shape[1])


def _greedy(grid: _Grid, hessian: Tensor) -> Tensor:
    """Codes [N, K] of the greedy pass."""
    order = hessian.diagonal().argsort(descending=True)
    upper = _inverse_factor(hessian[order][:, order])
    weight = grid.weight[:, order]
    scales, zero = grid.scales[:, order].T.contiguous(), grid.zero[:, order].T.contiguous()
    codes = torch.empty_like(scales)  # [K, N]: a column at a time is read and written
    for start in range(0, len(order), _LAZY):
        end = min(start + _LAZY, len(order))
        part = weight[:, start:end].T.contiguous()
        errors = torch.empty_like(part)
        for index in range(end - start):
            at = start + index
            value = part[index]
            codes[at] = (value / scales[at]).add_(zero[at]).round_().clamp_(0, grid.top)
            errors[index] = (value - (codes[at] - zero[at]) * scales[at]) / upper[at, at]
            part[index + 1 :].addr_(upper[at, at + 1 : end], errors[index], alpha=-1)
        weight[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    return codes[order.argsort()].T.contiguous()


def _descend(grid: _Grid, codes: Tensor, hessian: Tensor) -> None:
    """One pass over the codes [N, K], in place: each takes the value that is best with all others as they are."""
    error = grid.values(codes) - grid.weight
    slope = (error @ hessian).T.contiguous()
    scales, zero = grid.scales.T.contiguous(), grid.zero.T.contiguous()
    columns = codes.T.contiguous()
    curvature = hessian.diagonal()
    for start in range(0, len(columns), _LAZY):
        end = min(start + _LAZY, len(columns))
        moved = torch.empty_like(columns[start:end])
        for index in range(start, end):
            value = (columns[index] - zero[index]) * scales[index]
            wanted = value - slope[index] / curvature[index]
            columns[index] = (wanted / scales[index]).add_(zero[index]).round_().clamp_(0, grid.top)
            moved[index - start] = (columns[index] - zero[index]) * scales[index] - value
            slope[start:end].addr_(hessian[index, start:end], moved[index - start])
        slope[end:].addmm_(hessian[end:, start:end], moved)
    codes.copy_(columns.T)


def _take_better(grid: _Grid, codes: Tensor, others: Tensor, hessian: Tensor) -> None:
    """Replace the rows of codes [N, K] that have a larger error than those of others."""
    own, other = (_errors(grid.weight - grid.values(each), hessian) for each in (codes, others))
    better = other < own
    codes[better] = others[better]


def _errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """[N, K] -> [N]."""
    return (difference @ hessian).mul_(difference).sum(1)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """H with a larger diagonal; inputs that were always zero get one of their own."""
    diagonal = hessian.diagonal()
    mean = float(diagonal[diagonal > 0].mean()) if bool((diagonal > 0).any()) else 1.0
    added = torch.where(diagonal > 0, damping * mean, mean)
    return hessian + torch.diag(added)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1."""
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
    """Scales as they are stored; none is zero."""
    return torch.where(scales > 0, scales.half().float().clamp(min=_TINY), 1.0)
