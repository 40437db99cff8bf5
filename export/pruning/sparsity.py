"""Unstructured and semi-structured pruning: weights set to zero, and kept there while the others train on.

A weight's score is its magnitude, compared over the whole matrix (Han et al., arXiv 1506.02626), or Wanda's |w| ||x||
with x its input on calibration text, compared within each output (Sun et al., arXiv 2306.11695). The pattern 2:4 takes
the better two of every four neighbouring inputs, which sparse tensor cores (NVIDIA, since Ampere) can skip.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from transformers.pytorch_utils import Conv1D

from edgemix.export.models.layout import Part
from edgemix.export.quantization.statistics.calibration import calibrate
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    Pattern = Literal["unstructured", "2:4"]
    Criterion = Literal["wanda", "magnitude"]


def linears(model: PreTrainedModel) -> dict[str, Part]:
    """The linears whose weights may become zero: all but the head, by name."""
    head = model.get_output_embeddings()
    return {
        name: Part(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def sparsify(
    model: PreTrainedModel,
    sparsity: float,
    *,
    pattern: Pattern = "unstructured",
    criterion: Criterion = "wanda",
    windows: Sequence[Sequence[int]] = (),
    progress: Progress = NO_PROGRESS,
) -> None:
    """Set a share of each linear's weights to zero, in place. Weights that are zero already are the first to go.

    Args:
        model: A causal language model in evaluation mode.
        sparsity: The share; in the pattern 2:4 up to 0.5, and below that only so many groups of four are thinned out.
        pattern: Where zeros may lie.
        criterion: What decides.
        windows: Calibration text as token ids, for `wanda`: each layer reads what those before it make of it after they
            were pruned.
        progress: Hears of every layer.

    Raises:
        InputError: `wanda` has no text, or the model's structure is not known.
    """
    if criterion == "magnitude":
        for part in linears(model).values():
            _set_zeros(part, kept(part.weight.abs(), sparsity, pattern, by_row=False))
        return
    for calibrated in calibrate(model, windows, progress=progress):
        for name, part in calibrated.linears.items():
            norms = calibrated.statistics[name].hessian.diagonal().sqrt()
            _set_zeros(part, kept(part.weight.abs() * norms, sparsity, pattern, by_row=True))


def kept(scores: Tensor, sparsity: float, pattern: Pattern, *, by_row: bool) -> Tensor:
    """Which weights stay: bool [outputs, inputs]; of equal scores the first ones.

    Args:
        scores: [outputs, inputs], the larger the more needed.
        sparsity: Share that goes.
        pattern: Where zeros may lie. Inputs beyond the last whole group of four all stay.
        by_row: Compare the weights of one output; otherwise those of the whole matrix.
    """
    if pattern == "2:4":
        return _two_of_four(scores, sparsity)
    rows = scores if by_row else scores.reshape(1, -1)
    count = round(rows.shape[1] * sparsity)
    going = rows.argsort(dim=1, stable=True, descending=True)[:, rows.shape[1] - count :]
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, going, value=False)
    return mask.reshape(scores.shape)


@contextmanager
def zeros_kept(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, weights of linears that are zero get no gradient: an optimiser without decay leaves them."""
    handles = []
    for part in linears(model).values():
        weight = part.module.weight
        if weight.requires_grad:
            mask = weight.detach() != 0
            handles.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _two_of_four(scores: Tensor, sparsity: float) -> Tensor:
    whole = scores.shape[1] // 4 * 4
    groups = scores[:, :whole].reshape(-1, 4)
    order = groups.argsort(dim=1, stable=True, descending=True)
    thinned = torch.ones_like(groups, dtype=torch.bool)
    thinned.scatter_(1, order[:, 2:], value=False)
    if sparsity < 0.5:  # on the way there: the groups that lose the least
        lost = groups.masked_fill(thinned, 0).square().sum(1)
        going = lost.argsort(stable=True)[: round(len(groups) * 2 * sparsity)]
        some = torch.ones_like(thinned)
        some[going] = thinned[going]
        thinned = some
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[:, :whole] = thinned.reshape(len(scores), whole)
    return mask


def _set_zeros(part: Part, mask: Tensor) -> None:
    part.set_weight(torch.where(mask, part.weight, 0.0))  # not a product, which would make zeros of either sign
