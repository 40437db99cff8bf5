"""The inputs of a model's linears."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemix.export.models.layout import layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_inputs(model: PreTrainedModel, windows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Name of each linear -> its inputs [tokens, K], from the model run on one window after the other."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        part.module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))
        )
        for name, part in layout(model).linears().items()
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=torch.tensor([window]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}
