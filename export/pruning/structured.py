"""Structured pruning: whole channels, heads and layers leave; the result is a plain smaller model of the same class.

A channel's absence is made up for by those that stay. With H the second moment of what a linear W reads, the error
E|W x - W' x|^2 over all W' without the columns S is least at

    W' = W - W_S [H^-1_SS]^-1 H^-1_S,   with the error  trace(W_S [H^-1_SS]^-1 W_S^T)

(Optimal Brain Surgeon). Columns leave one after the other, those with the least error first, W and H^-1 brought up to
date in between. In the same way a key-value group leaves, with the columns of all its query heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from edgemix.export.pruning.structure import Sizes, Structure, rows_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgemix.export.pruning.importance import Importance
    from edgemix.recipe.compression import Pruning

T = TypeVar("T")

DAMPING = 1e-3
"""Share of H's mean diagonal that is added to it: calibration text does not span all directions."""

_ROUNDS = 32
"""Rounds in which a layer's channels leave, those that are least needed in each. Of SmolLM2-135M's channels an eighth
less: 1.64% of the squared output is lost in 32 rounds and in 128, 1.68% in one; 5.9% if nothing is made up for."""


def sizes(model: PreTrainedModel, pruning: Pruning, share: float = 1.0) -> Sizes:
    """What pruning leaves of a model's sizes, in numbers that kernels like.

    Channels come in multiples of 64 (of 32 below 512 of them), the block sizes of the quantised formats; heads in whole
    key-value groups, as many as the model's configuration takes. Nothing goes below one unit, or up.

    Args:
        model: The model that is cut.
        pruning: The shares that are removed.
        share: How far to go: 1 to the end.

    Raises:
        InputError: The model's structure is not known.
    """
    structure = Structure(model)
    now = structure.sizes
    unit = 64 if now.ffn >= 512 else 32
    ffn = now.ffn if not pruning.ffn else round(now.ffn * (1 - share * pruning.ffn) / unit) * unit
    layers = max(1, round(now.layers * (1 - share * pruning.layers)))
    heads = now.key_value_heads * (1 - share * pruning.heads)
    counts = sorted(range(1, now.key_value_heads + 1), key=lambda count: (abs(count - heads), -count))
    possible = (count for count in counts if structure.allows(Sizes(now.layers, now.ffn, count)))
    return Sizes(layers, min(max(ffn, unit), now.ffn), next(possible))


def cut(model: PreTrainedModel, sizes: Sizes, importance: Importance) -> PreTrainedModel:
    """A new, smaller model of the same class; `model` stays as it is.

    Args:
        model: A causal language model.
        sizes: What is to be left of it; what is not smaller than it was stays.
        importance: Of this model, for all that is cut.

    Raises:
        InputError: The model's structure is not known, or its class cannot do these sizes.
        ValueError: `importance` lacks what is needed.
    """
    structure = Structure(model)
    now = structure.sizes
    layers = kept_layers(now, sizes, importance)
    channels, heads, weights = [], [], {}
    for index in layers:
        layer = structure.layers[index]
        kept_channels, kept_heads = torch.arange(now.ffn), torch.arange(now.key_value_heads)
        if sizes.ffn < now.ffn:
            moment = _measured(importance.channels, "channels")[index]
            kept_channels, weights[layer.down] = without(layer.down.weight.cpu(), moment, sizes.ffn)
        if sizes.key_value_heads < now.key_value_heads:
            moment = _measured(importance.heads, "heads")[index]
            kept_heads, weights[layer.output] = without(
                layer.output.weight.cpu(), moment, sizes.key_value_heads, size=structure.group
            )
        channels.append(kept_channels)
        heads.append(kept_heads)
    return structure.resized(layers, channels, heads, weights)


def without(weight: Tensor, moment: Tensor, keep: int, *, size: int = 1) -> tuple[Tensor, Tensor]:
    """Take units of columns from a linear until `keep` are left, the least needed first.

    Args:
        weight: [outputs, inputs].
        moment: The mean of x x^T over its inputs x: [inputs, inputs].
        keep: Units that stay.
        size: Columns of a unit.

    Returns:
        The units that stay, int64, ascending, and the weight with all its columns: those of the others are zero, those
        that stay have taken over what they can.
    """
    new = weight.double()
    inverse = _inverse(moment.double())
    units = weight.shape[1] // size
    left = torch.ones(units, dtype=torch.bool)
    most = max(1, -(-(units - keep) // _ROUNDS)) if size == 1 else 1
    while (excess := int(left.sum()) - keep) > 0:
        errors = _errors(new, inverse, size, left)
        going = errors.topk(min(most, excess), largest=False).indices
        columns = rows_of(going, size)
        solved = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        new.addmm_(new[:, columns], solved, alpha=-1)
        inverse.addmm_(inverse[:, columns], solved, alpha=-1)
        left[going] = False
    new[:, rows_of((~left).nonzero()[:, 0], size)] = 0
    return left.nonzero()[:, 0], new.to(weight.dtype)


def _inverse(moment: Tensor) -> Tensor:
    """The inverse of a moment, made regular."""
    mean = moment.diagonal().mean()
    damping = DAMPING * (mean if mean > 0 else torch.ones_like(mean))
    return torch.cholesky_inverse(torch.linalg.cholesky(moment + damping * torch.eye(len(moment), dtype=moment.dtype)))


def _errors(weight: Tensor, inverse: Tensor, size: int, left: Tensor) -> Tensor:
    """The least error that the output has without each unit: [units]; infinite for those that are gone."""
    errors = torch.full(left.shape, torch.inf, dtype=weight.dtype)
    if size == 1:
        errors[left] = (weight.square().sum(0) / inverse.diagonal())[left]
        return errors
    units = left.nonzero()[:, 0]
    blocks = inverse.reshape(len(left), size, len(left), size)[units, :, units]  # [units, size, size]
    parts = weight.reshape(len(weight), -1, size).permute(1, 2, 0)[units]  # [units, size, outputs]
    errors[units] = (torch.linalg.solve(blocks, parts) * parts).sum((1, 2))
    return errors


def kept_layers(now: Sizes, sizes: Sizes, importance: Importance) -> list[int]:
    """The indices of the layers that `cut` leaves, ascending: those whose absence costs the most."""
    if sizes.layers >= now.layers:
        return list(range(now.layers))
    kept: list[int] = _measured(importance.layers, "layers").topk(sizes.layers).indices.tolist()
    return sorted(kept)


def _measured(part: T | None, name: str) -> T:
    if part is None:
        raise ValueError(f"the importance of {name} was not measured")
    return part
