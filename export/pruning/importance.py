"""What can be missed: measured on calibration text, for channels, heads and layers.

For channels and heads it is the second moment of what the next linear reads, H = mean of x x^T: with it the loss of a
channel is known exactly as far as that linear's output goes, after the other channels have taken over what they can
(Optimal Brain Surgeon; Kurtic et al., ZipLM, arXiv 2302.04089). For layers it is how far the model's own distributions
move when the layer is left out: the block influence 1 - cos(h_in, h_out) of ShortGPT (arXiv 2403.03853) costs one pass,
but is blind to what later layers make of the difference.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from edgemix.export.pruning.structure import Structure
from edgemix.export.training.token_loss import has_fast_bfloat16
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgemix.export.pruning.structure import Sizes

LAYER_TOKENS = 2_048
"""Tokens that each layer's absence is measured on: it takes a pass over them for every layer."""

_BATCH_TOKENS = 2_048


@dataclass(frozen=True)
class Importance:
    """What calibration text tells of a decoder; None for what was not measured.

    Attributes:
        channels: For each layer fp32 [ffn, ffn], the second moment of its channels' activations.
        heads: For each layer fp32 [heads * head size] squared, that of the heads' outputs.
        layers: fp32 [layers], KL in nats a token from the whole model to the one without the layer.
    """

    channels: tuple[Tensor, ...] | None = None
    heads: tuple[Tensor, ...] | None = None
    layers: Tensor | None = None


def importance(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    sizes: Sizes | None = None,
    progress: Progress = NO_PROGRESS,
) -> Importance:
    """Measure what `cut` needs.

    The moments take 4 ffn^2 bytes a layer: 0.3 GB for SmolLM2-135M, 6 GB for a model of 1.7 billion weights.

    Args:
        model: A causal language model in evaluation mode.
        windows: Calibration text as token ids; some thousand tokens at least.
        sizes: What is to be reached: only what decides on that is measured. None measures everything.
        progress: Hears of every pass.

    Raises:
        InputError: The model's structure is not known.
    """
    structure = Structure(model)
    now = structure.sizes
    channels = sizes is None or sizes.ffn < now.ffn
    heads = sizes is None or sizes.key_value_heads < now.key_value_heads
    watched = [layer.down.module for layer in structure.layers if channels]
    watched += [layer.output.module for layer in structure.layers if heads]
    moments = second_moments(model, watched, windows, progress)
    return Importance(
        tuple(moments[layer.down.module] for layer in structure.layers) if channels else None,
        tuple(moments[layer.output.module] for layer in structure.layers) if heads else None,
        _distances_without(model, structure, windows, progress) if sizes is None or sizes.layers < now.layers else None,
    )


def second_moments(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    windows: Sequence[Sequence[int]],
    progress: Progress = NO_PROGRESS,
) -> dict[nn.Module, Tensor]:
    """The mean of x x^T over tokens, x what a linear reads: fp32 [inputs, inputs] for each.

    Args:
        model: The model that the modules are part of.
        modules: The linears.
        windows: Texts as token ids.
        progress: Hears of every batch.
    """
    sums: dict[nn.Module, Tensor] = {}
    tokens = sum(map(len, windows))

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).float()
        with torch.autocast(rows.device.type, enabled=False):  # in half precision no moment has an inverse
            part = rows.T @ rows
        sums[module] = part if module not in sums else sums[module].add_(part)

    if not modules:
        return {}
    handles = [module.register_forward_pre_hook(add) for module in modules]
    try:
        with progress.stage("calibrate", tokens) as task:
            for ids in batches(windows, model.device):
                forward(model, ids)
                task.advance(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    return {module: total.cpu() / tokens for module, total in sums.items()}


def forward(model: PreTrainedModel, ids: Tensor) -> None:
    """Run the layers, not the head, on token ids [batch, length]."""
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=has_fast_bfloat16(ids.device)):
        model.base_model(input_ids=ids, use_cache=False)


def batches(windows: Sequence[Sequence[int]], device: torch.device) -> Iterator[Tensor]:
    """Windows of one length together, about `_BATCH_TOKENS` tokens at a time."""
    waiting: list[Sequence[int]] = []
    for window in windows:
        if waiting and (len(window) != len(waiting[0]) or (len(waiting) + 1) * len(window) > _BATCH_TOKENS):
            yield torch.tensor(waiting, device=device)
            waiting = []
        waiting.append(window)
    if waiting:
        yield torch.tensor(waiting, device=device)


def _distances_without(
    model: PreTrainedModel, structure: Structure, windows: Sequence[Sequence[int]], progress: Progress
) -> Tensor:
    """How far the model's distributions move without each layer: fp32 [layers], mean KL in nats a token."""
    starts = accumulate(map(len, windows), initial=0)
    some = [window for window, start in zip(windows, starts, strict=False) if start < LAYER_TOKENS]
    distances = torch.zeros(len(structure.layers))
    with progress.stage("layers", len(some)) as task:
        for window in some:
            whole = _log_probabilities(model, window)
            for index, layer in enumerate(structure.layers):
                with _left_out(layer.module):
                    found = _log_probabilities(model, window)
                distances[index] += float((whole.exp() * (whole - found)).sum())
            task.advance()
    return distances / sum(map(len, some))


def _log_probabilities(model: PreTrainedModel, window: Sequence[int]) -> Tensor:
    """fp32 [tokens, vocabulary]."""
    ids = torch.tensor([list(window)], device=model.device)
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=has_fast_bfloat16(ids.device)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float().log_softmax(-1)


@contextmanager
def _left_out(layer: nn.Module) -> Iterator[None]:
    """Let a layer give back the hidden states that it got."""

    def passed(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(passed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
