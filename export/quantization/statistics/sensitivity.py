"""Estimate the loss by quantizing each linear alone, so that bits can go where they matter.

To second order, changing a weight row by d costs KL = 1/2 d F d^T nats a token, with F the Fisher information of that
row, the mean of (d loss / d y)^2 x x^T over tokens. F is taken apart into what depends on the token and what on the
row,

    F_r = rows_r / (sum of rows) * mean over tokens of |d loss / d y|^2 x x^T.

That leaves out that the errors of several tokens meet in later ones; it does so for all linears, so the costs are
scaled to the KL that is measured with some layers quantized, on text that the statistics have not seen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from edgemix.export.models.layout import Layout, layout
from edgemix.export.quantization.algorithms.gptq import gptq
from edgemix.export.quantization.statistics.calibration import calibrate, output_gradients
from edgemix.export.training.losses import divergence
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

BITS = (4, 8)

_MEASURED = 6
"""Layers that are quantized at once to see how far the estimate is off; more would bend the second order."""

_HELD_OUT = 0.25
"""Share of the windows to measure on."""


def quantization_costs(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    block: int,
    parts: Layout | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, dict[int, float]]:
    """Estimate the KL, in nats a token, by quantizing each linear alone: name of the linear -> bits -> KL.

    The costs of several linears add up, nearly. Each is quantized by GPTQ with asymmetric blocks.

    Args:
        model: In evaluation mode; unchanged when the call ends.
        windows: Token ids of calibration text.
        block: Inputs that share a scale.
        parts: The model's layout, if it is known already.
        progress: Progress callback.
    """
    parts = layout(model) if parts is None else parts
    held_out = max(1, math.ceil(_HELD_OUT * len(windows))) if windows else 0
    seen = windows[:-held_out] if len(windows) > 1 else windows
    gradients = output_gradients(model, seen, parts=parts, progress=progress)
    every = max(1, math.ceil(len(parts.layers) / _MEASURED))
    measured: dict[str, Tensor] = {}
    found: dict[str, dict[int, float]] = {}
    for index, calibrated in enumerate(calibrate(model, seen, parts=parts, gradients=gradients, progress=progress)):
        for name, part in calibrated.linears.items():
            weight, hessian, (tokens, rows) = part.weight, calibrated.statistics[name].hessian, gradients[name]
            share = rows / rows.sum().clamp(min=1e-30)
            found[name] = {}
            for bits in BITS:
                blocks = gptq(weight, hessian, bits=bits, block=block, sweeps=0)
                quantized = torch.from_numpy(blocks.dequantized()).to(weight)
                lost = (weight - quantized).float()
                # H is twice the mean of x x^T with weights that are 1 on average.
                second_order = float((((lost @ hessian) * lost).sum(1) * share).sum()) * float(tokens.mean()) / 2
                found[name][bits] = second_order / 2
                if bits == BITS[0] and index % every == every // 2:
                    measured[name] = quantized
    estimate = sum(found[name][BITS[0]] for name in measured)
    factor = _measure(model, parts, measured, windows[-held_out:]) / max(estimate, 1e-30)
    return {name: {bits: factor * cost for bits, cost in each.items()} for name, each in found.items()}


def most_sensitive(found: Mapping[str, Mapping[int, float]], parts: Layout, share: float) -> tuple[str, ...]:
    """Return the linears that 8 bits help most, each with those that read the same activation.

    Args:
        found: The result of `quantization_costs`.
        parts: The layout of the same model.
        share: About the share of the layers' weights; above 0, at least one group is returned.
    """
    linears = parts.linears()
    sizes = {name: part.weight.numel() for name, part in linears.items()}

    def worth(group: tuple[str, ...]) -> float:
        saved = sum(found[name][4] - found[name][8] for name in group)
        return float(saved / sum(sizes[name] for name in group))

    groups = sorted((group for layer in parts.layers for group in layer.groups()), key=worth, reverse=True)
    room: float = share * sum(sizes.values())
    taken: set[str] = set()
    for group in groups:
        if room <= 0:
            break
        taken |= {*group}
        room -= sum(sizes[name] for name in group)
    return tuple(name for name in linears if name in taken)


def _measure(
    model: PreTrainedModel, parts: Layout, weights: Mapping[str, Tensor], windows: Sequence[Sequence[int]]
) -> float:
    """Measure the mean KL, nats a token, of the model with some weights replaced from the model."""
    linears = parts.linears()
    total = 0.0
    for window in windows:
        ids = torch.tensor([list(window)], device=model.device)
        with torch.no_grad():
            before = model(input_ids=ids, use_cache=False).logits[0]
            kept = {name: linears[name].weight.clone() for name in weights}
            try:
                for name, weight in weights.items():
                    linears[name].set_weight(weight)
                after = model(input_ids=ids, use_cache=False).logits[0]
            finally:
                for name, weight in kept.items():
                    linears[name].set_weight(weight)
        total += float(divergence(before, after)) * len(window)
    return total / sum(len(window) for window in windows)
