"""Prepare a model for quantization: it computes the same, and loses less when it is quantized."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from edgemix.export.models.layout import layout
from edgemix.export.quantization.statistics.calibration import calibrate
from edgemix.export.quantization.transforms.awq import scale_weights
from edgemix.export.quantization.transforms.rotation import rotate_residual, rotate_values
from edgemix.progress import NO_PROGRESS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from edgemix.progress import Progress
    from edgemix.recipe.compression import Quantization

_BITS = 4


def prepare_model(
    model: PreTrainedModel,
    quantization: Quantization,
    windows: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> PreTrainedModel:
    """Rotate a model (R1 and R2) and fold scales into its weights (AWQ, for 4 bits), as `quantization` says.

    Args:
        model: In fp32 and evaluation mode; unchanged.
        quantization: Its `rotate`, `scale` and `group`.
        windows: Token ids of calibration text; scales need some.
        seed: Seed of the rotation.
        progress: Progress callback.

    Raises:
        InputError: The model's structure is not known, or does not allow it.
    """
    model = copy.deepcopy(model)
    parts = layout(model)
    if quantization.rotate:
        with progress.stage("rotate"):
            parts = rotate_residual(model, parts, seed)
            rotate_values(parts, seed)
    if quantization.scale:
        for layer in calibrate(model, windows, parts=parts, progress=progress):
            scale_weights(layer, bits=_BITS, block=quantization.group)
    return model
