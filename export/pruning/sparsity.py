"""Unstructured and semi-structured pruning: set weights to zero, and keep them there while the others are trained.

A weight's score is its magnitude, compared over the whole matrix (Han et al., arXiv 1506.02626), or Wanda's |w| ||x||
with x its input on calibration text, compared within each output (Sun et al., arXiv 2306.11695). The pattern 2:4 keeps
the best two of every four adjacent inputs; NVIDIA's sparse tensor cores (since Ampere) skip the others.
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
    """Return the linears that may be pruned by name: all except the head."""
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
    """Set a fraction of each linear's weights to zero, in place. Weights that are zero already are removed first.

    Args:
        model: A causal language model in evaluation mode.
        sparsity: The fraction. In the pattern 2:4 at most 0.5; below that, only a part of the groups of four is pruned.
        pattern: Where zeros may be.
        criterion: Score of a weight.
        windows: Calibration text as token ids, for `wanda`; each layer reads the output of the pruned layers before it.
        progress: Progress callback.

    Raises:
        InputError: `wanda` has no text, or the model's structure is not supported.
    """
    if criterion == "magnitude":
        for part in linears(model).values():
            _apply_mask(part, keep_mask(part.weight.abs(), sparsity, pattern, by_row=False))
        return
    for calibrated in calibrate(model, windows, progress=progress):
        for name, part in calibrated.linears.items():
            norms = calibrated.statistics[name].hessian.diagonal().sqrt()
            _apply_mask(part, keep_mask(part.weight.abs() * norms, sparsity, pattern, by_row=True))


def keep_mask(scores: Tensor, sparsity: float, pattern: Pattern, *, by_row: bool) -> Tensor:
    """Return the mask of weights to keep: bool [outputs, inputs]; of equal scores, the first are kept.

    Args:
        scores: [outputs, inputs]; higher is more important.
        sparsity: Fraction to remove.
        pattern: Where zeros may be. Inputs beyond the last whole group of four are all kept.
        by_row: Compare the weights of each output; otherwise those of the whole matrix.
    """
    if pattern == "2:4":
        return _two_of_four(scores, sparsity)
    rows = scores if by_row else scores.reshape(1, -1)
    count = round(rows.shape[1] * sparsity)
    removed = rows.argsort(dim=1, stable=True, descending=True)[:, rows.shape[1] - count :]
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, removed, value=False)
    return mask.reshape(scores.shape)


@contextmanager
def preserve_zeros(model: PreTrainedModel) -> Iterator[None]:
    """Give zero weights of linears no gradient within the block: an optimizer without weight decay then keeps them."""
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
    kept = torch.ones_like(groups, dtype=torch.bool)
    kept.scatter_(1, order[:, 2:], value=False)
    if sparsity < 0.5:  # an intermediate cut: prune the groups that lose the least
        lost = groups.masked_fill(kept, 0).square().sum(1)
        pruned = lost.argsort(stable=True)[: round(len(groups) * 2 * sparsity)]
        kept_in_part = torch.ones_like(kept)
        kept_in_part[pruned] = kept[pruned]
        kept = kept_in_part
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[:, :whole] = kept.reshape(len(scores), whole)
    return mask


def _apply_mask(part: Part, mask: Tensor) -> None:
    part.set_weight(torch.where(mask, part.weight, 0.0))  # a product would make zeros of either sign
