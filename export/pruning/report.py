"""Report on a pruned model: sizes and zeros by layer, and its divergence from the original on held-out text."""

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

SPEED_NOTE = (
    "Zeros save space, not time: ONNX Runtime multiplies by them as by any number, on CPUs and on CUDA alike. "
    "Only TensorRT's sparse tensor cores skip them, where their pattern is 2:4 (NVIDIA Ampere or later). "
    "Fewer layers, channels and heads save both, everywhere."
)


@dataclass(frozen=True)
class LayerReport:
    """Sizes of one layer, or of everything outside the layers.

    Attributes:
        name: Name of the layer in the original model; "outside layers" for embeddings, last norm and head.
        parameters_before, parameters_after: Number of weights; 0 after the layer was removed.
        zeros: Number of zeros after pruning.
        bytes_before, bytes_after: Size in float32, with zeros stored as a mask, as in a bundle, where that is smaller.
    """

    name: str
    parameters_before: int
    parameters_after: int
    zeros: int
    bytes_before: int
    bytes_after: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights after pruning."""
        return self.zeros / self.parameters_after if self.parameters_after else 0.0


@dataclass(frozen=True)
class PruningReport:
    """The results of a pruning run.

    Attributes:
        before, after: Layers, channels and key-value heads; None where the model's structure is not supported.
        parts: Each layer, then everything outside the layers.
        total: Their sum.
        figures: Divergence from the original model.
        recovery_steps: Optimizer steps of recovery over all cuts.
        recovery_seconds: Time they took.
    """

    before: Sizes | None
    after: Sizes | None
    parts: tuple[LayerReport, ...]
    total: LayerReport
    figures: PruningFigures
    recovery_steps: int = 0
    recovery_seconds: float = 0.0

    @property
    def over_limits(self) -> bool:
        """Whether the parity gate of an export would refuse this model."""
        figures = self.figures
        return not (figures.kl <= figures.kl_limit and figures.perplexity_ratio <= figures.perplexity_ratio_limit)


def sparsity(model: PreTrainedModel) -> float:
    """Return the fraction of zeros among the weights of all linears except the head."""
    weights = [part.weight for part in linears(model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(1, _count(weights))


def compare(teacher: PreTrainedModel, model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> PruningFigures:
    """Measure a pruned model against the original.

    Args:
        teacher: The original model.
        model: The pruned model, on the same device.
        windows: Held-out text as token ids.
    """
    kl = loss_increase = 0.0
    tokens = sum(len(window) - 1 for window in windows)
    for window in windows:
        ids = torch.tensor([list(window)], device=model.device)
        with torch.no_grad():
            p, q = (
                each(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1) for each in (teacher, model)
            )
        kl += float((p.exp() * (p - q)).sum())
        loss_increase += float((p - q).gather(1, ids[0, 1:, None]).sum())
    return PruningFigures(
        parameters_before=_count(teacher.parameters()),
        parameters_after=_count(model.parameters()),
        sparsity=sparsity(model),
        tokens=tokens,
        kl=kl / tokens,
        kl_limit=PRUNING_LIMITS.kl,
        perplexity_ratio=math.exp(min(loss_increase / tokens, 700.0)),
        perplexity_ratio_limit=PRUNING_LIMITS.perplexity_ratio,
    )


def layer_reports(teacher: PreTrainedModel, model: PreTrainedModel, kept: Sequence[int]) -> tuple[LayerReport, ...]:
    """Report the sizes and zeros of each layer, and of everything outside the layers.

    Args:
        teacher: The original model.
        model: The pruned model.
        kept: Index of each of its layers in the original model.
    """
    old, new = (layers_of(each) for each in (teacher, model))
    positions = {index: number for number, index in enumerate(kept)}
    parts = []
    for index, (name, layer) in enumerate(old.items()):
        remaining = list(new.values())[positions[index]] if index in positions else None
        after = [] if remaining is None else list(remaining.parameters())
        parts.append(_layer_report(name, list(layer.parameters()), after))
    outside = [
        [each for name, each in whole.named_parameters() if not any(name.startswith(f"{layer}.") for layer in layers)]
        for whole, layers in ((teacher, old), (model, new))
    ]
    return (*parts, _layer_report("outside layers", *outside))


def sum_reports(parts: Sequence[LayerReport]) -> LayerReport:
    """Return the sum of reports."""
    names = ("parameters_before", "parameters_after", "zeros", "bytes_before", "bytes_after")
    return LayerReport("total", *(sum(getattr(part, name) for part in parts) for name in names))


def layers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the decoder layers by name; empty if the model's structure is not supported."""
    try:
        return {layer.name: layer.module for layer in layout(model).layers}
    except InputError:
        return {}


def _layer_report(name: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> LayerReport:
    zeros = [int((each == 0).sum()) for each in after]
    return LayerReport(
        name,
        _count(before),
        _count(after),
        sum(zeros),
        sum(_bytes(each.numel(), 0) for each in before),
        sum(_bytes(each.numel(), count) for each, count in zip(after, zeros, strict=True)),
    )


def _bytes(numbers: int, zeros: int) -> int:
    """Return the bytes of a float32 tensor, with its zeros stored as a mask if there are many."""
    return 4 * (numbers - zeros) + -(-numbers // 8) if zeros > WORTH_A_MASK * numbers else 4 * numbers


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(int(each.numel()) for each in parameters)
