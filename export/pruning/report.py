"""What pruning did: sizes and zeros by layer, and how far the model has moved on text that it was not fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgemix.bundle.manifest import PruningFigures
from edgemix.bundle.sparse_storage import WORTH_A_MASK
from edgemix.errors import InputError
from edgemix.export.models.layout import layout
from edgemix.export.parity.limits import PRUNING_LIMITS
from edgemix.export.pruning.sparsity import linears

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgemix.export.pruning.structure import Sizes

SPEED = (
    "Zeros save space, not time: ONNX Runtime multiplies by them as by any number, on CPUs and on CUDA alike. "
    "Only TensorRT's sparse tensor cores skip them, where their pattern is 2:4 (NVIDIA Ampere or later). "
    "Fewer layers, channels and heads save both, everywhere."
)


@dataclass(frozen=True)
class PartReport:
    """One layer, or all that lies outside of layers.

    Attributes:
        name: Of the layer in the model as it was; "outside layers" for embeddings, last norm and head.
        parameters_before, parameters_after: Number of weights; none after where the layer is gone.
        zeros: How many of those after are zero.
        bytes_before, bytes_after: In float32, zeros stored as a mask as in a bundle, where that is smaller.
    """

    name: str
    parameters_before: int
    parameters_after: int
    zeros: int
    bytes_before: int
    bytes_after: int

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights after."""
        return self.zeros / self.parameters_after if self.parameters_after else 0.0


@dataclass(frozen=True)
class PruningReport:
    """What a pruning did.

    Attributes:
        before, after: Layers, channels and key-value heads; None where the model's structure is not known.
        parts: By layer, and the rest.
        total: All of them together.
        figures: How far the model has moved.
        recovery_steps: Optimiser steps of recovery over all cuts, `recovery_seconds` the time they took.
    """

    before: Sizes | None
    after: Sizes | None
    parts: tuple[PartReport, ...]
    total: PartReport
    figures: PruningFigures
    recovery_steps: int = 0
    recovery_seconds: float = 0.0

    @property
    def over_limits(self) -> bool:
        """Whether the parity gate of an export would stop this pruning."""
        figures = self.figures
        return not (figures.kl <= figures.kl_limit and figures.perplexity_ratio <= figures.perplexity_ratio_limit)


def sparsity(model: PreTrainedModel) -> float:
    """Share of zeros among the weights of all linears but the head."""
    weights = [part.weight for part in linears(model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(1, _count(weights))


def compare(teacher: PreTrainedModel, model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> PruningFigures:
    """Measure a pruned model against the model that it was cut from.

    Args:
        teacher: The model as it was.
        model: What is left of it, on the same device.
        windows: Text as token ids that neither was fitted to.
    """
    kl = surprise = 0.0
    tokens = sum(len(window) - 1 for window in windows)
    for window in windows:
        ids = torch.tensor([list(window)], device=model.device)
        with torch.no_grad():
            p, q = (
                each(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1) for each in (teacher, model)
            )
        kl += float((p.exp() * (p - q)).sum())
        surprise += float((p - q).gather(1, ids[0, 1:, None]).sum())
    return PruningFigures(
        parameters_before=_count(teacher.parameters()),
        parameters_after=_count(model.parameters()),
        sparsity=sparsity(model),
        tokens=tokens,
        kl=kl / tokens,
        kl_limit=PRUNING_LIMITS.kl,
        perplexity_ratio=math.exp(min(surprise / tokens, 700.0)),
        perplexity_ratio_limit=PRUNING_LIMITS.perplexity_ratio,
    )


def parts_of(teacher: PreTrainedModel, model: PreTrainedModel, kept: Sequence[int]) -> tuple[PartReport, ...]:
    """Sizes and zeros by layer.

    Args:
        teacher: The model as it was.
        model: What is left of it.
        kept: Of each of its layers, the index in the model as it was.
    """
    old, new = (layers_of(each) for each in (teacher, model))
    places = {index: number for number, index in enumerate(kept)}
    parts = []
    for index, (name, layer) in enumerate(old.items()):
        left = list(new.values())[places[index]] if index in places else None
        parts.append(_part(name, list(layer.parameters()), [] if left is None else list(left.parameters())))
    outside = [
        [each for name, each in whole.named_parameters() if not any(name.startswith(f"{layer}.") for layer in layers)]
        for whole, layers in ((teacher, old), (model, new))
    ]
    return (*parts, _part("outside layers", *outside))


def total_of(parts: Sequence[PartReport]) -> PartReport:
    """All parts as one."""
    names = ("parameters_before", "parameters_after", "zeros", "bytes_before", "bytes_after")
    return PartReport("total", *(sum(getattr(part, name) for part in parts) for name in names))


def layers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers by name; none where the model's structure is not known."""
    try:
        return {layer.name: layer.module for layer in layout(model).layers}
    except InputError:
        return {}


def _part(name: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> PartReport:
    zeros = [int((each == 0).sum()) for each in after]
    return PartReport(
        name,
        _count(before),
        _count(after),
        sum(zeros),
        sum(_bytes(each.numel(), 0) for each in before),
        sum(_bytes(each.numel(), count) for each, count in zip(after, zeros, strict=True)),
    )


def _bytes(numbers: int, zeros: int) -> int:
    """Bytes of a tensor of float32 numbers, with the zeros as a mask where they are many."""
    return 4 * (numbers - zeros) + -(-numbers // 8) if zeros > WORTH_A_MASK * numbers else 4 * numbers


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(int(each.numel()) for each in parameters)
