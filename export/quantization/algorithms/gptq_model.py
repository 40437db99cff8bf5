"""GPTQ over a whole decoder: layer after layer, each for the inputs that the quantized layers before it compute."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from edgemix.export.models.layout import layout
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.gptq import gptq
from edgemix.export.quantization.statistics.calibration import calibrate, output_gradients
from edgemix.progress import NO_PROGRESS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from edgemix.progress import Progress

BITS = 4


def gptq_blocks(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    bits: Mapping[str, int] | None = None,
    block: int = 32,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> BlockTable:
    """Quantize all linears of a decoder but its head.

    Args:
        model: A causal language model in fp32 and evaluation mode; unchanged when the call ends.
        windows: Token ids of calibration text.
        bits: Name of a linear -> 8, for linears that get 8 bits instead of 4.
        block: Inputs that share a scale.
        seed: Seed of the tokens that gradients are computed for (`calibration.output_gradients`).
        progress: Progress callback.

    Returns:
        The blocks of each linear, found by the model's own weights.

    Raises:
        InputError: There is no text, or the model's structure is not known.
    """
    gradients = output_gradients(model, windows, seed=seed, progress=progress)
    model = copy.deepcopy(model)
    table = BlockTable()
    for layer in calibrate(model, windows, parts=layout(model), gradients=gradients, progress=progress):
        for name, part in layer.linears.items():
            weight = part.weight.contiguous()
            hessian = layer.statistics[name].hessian
            blocks = gptq(weight, hessian, bits=(bits or {}).get(name, BITS), block=block)
            table.add(weight.cpu().numpy(), blocks)
            part.set_weight(torch.from_numpy(blocks.dequantized()))
    return table
