"""Importance of channels, heads and layers, measured on calibration text.

For channels and heads it is the second moment of the next linear's input, H = mean of x x^T. It gives the exact error
of that linear's output when a channel is removed and the remaining channels compensate for it (Optimal Brain Surgeon;
Kurtic et al., ZipLM, arXiv 2302.04089). For layers it is the divergence of the model's distributions when the layer is
skipped: the block influence 1 - cos(h_in, h_out) of ShortGPT (arXiv 2403.03853) costs only one pass, but ignores what
later layers compute from the difference.
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
"""Tokens on which the importance of layers is measured, with one forward pass per layer."""

BATCH_TOKENS = 2_048


@dataclass(frozen=True)
class Importance:
    """Importance measurements of a decoder; None for parts that were not measured.

    Attributes:
        channels: For each layer, the second moment of its feed-forward activations: fp32 [ffn, ffn].
        heads: For each layer, the second moment of the heads' outputs: fp32 [heads * head size, heads * head size].
        layers: KL from the whole model to the model without each layer, in nats per token: fp32 [layers].
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
    """Measure the importance that `cut` needs.

    The moments take 4 ffn^2 bytes per layer: 0.3 GB for SmolLM2-135M, 6 GB for a model with 1.7 billion weights.

    Args:
        model: A causal language model in evaluation mode.
        windows: Calibration text as token ids; a few thousand tokens at least.
        sizes: Target sizes: only parts that shrink are measured. None measures everything.
        progress: Progress callback.

    Raises:
        InputError: The model's structure is not supported.
    """
    structure = Structure(model)
    now = structure.sizes
    channels = sizes is None or sizes.ffn < now.ffn
    heads = sizes is None or sizes.key_value_heads < now.key_value_heads
    modules = [layer.down.module for layer in structure.layers if channels]
    modules += [layer.output.module for layer in structure.layers if heads]
    moments = second_moments(model, modules, windows, progress)
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
    """Return the mean of x x^T over tokens for each linear's input x: fp32 [inputs, inputs].

    Args:
        model: The model that the modules are part of.
        modules: The linears.
        windows: Text as token ids.
        progress: Progress callback.
    """
    sums: dict[nn.Module, Tensor] = {}
    tokens = sum(map(len, windows))

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).float()
        with torch.autocast(rows.device.type, enabled=False):  # half precision would make the moments singular
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
    """Run the decoder layers, without the head, on token ids [batch, length]."""
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=has_fast_bfloat16(ids.device)):
        model.base_model(input_ids=ids, use_cache=False)


def batches(windows: Sequence[Sequence[int]], device: torch.device) -> Iterator[Tensor]:
    """Yield batches of windows of equal length with at most `BATCH_TOKENS` tokens: int64 [batch, length]."""
    batch: list[Sequence[int]] = []
    for window in windows:
        if batch and (len(window) != len(batch[0]) or (len(batch) + 1) * len(window) > BATCH_TOKENS):
            yield torch.tensor(batch, device=device)
            batch = []
        batch.append(window)
    if batch:
        yield torch.tensor(batch, device=device)


def _distances_without(
    model: PreTrainedModel, structure: Structure, windows: Sequence[Sequence[int]], progress: Progress
) -> Tensor:
    """Return the mean KL, in nats per token, from the model to itself without each layer: fp32 [layers]."""
    starts = accumulate(map(len, windows), initial=0)
    used = [window for window, start in zip(windows, starts, strict=False) if start < LAYER_TOKENS]
    distances = torch.zeros(len(structure.layers))
    with progress.stage("layers", len(used)) as task:
        for window in used:
            whole = _log_probabilities(model, window)
            for index, layer in enumerate(structure.layers):
                with _skipped(layer.module):
                    without = _log_probabilities(model, window)
                distances[index] += float((whole.exp() * (whole - without)).sum())
            task.advance()
    return distances / sum(map(len, used))


def _log_probabilities(model: PreTrainedModel, window: Sequence[int]) -> Tensor:
    """Return the log-probabilities after each token of a window: fp32 [tokens, vocabulary]."""
    ids = torch.tensor([list(window)], device=model.device)
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=has_fast_bfloat16(ids.device)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float().log_softmax(-1)


@contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """Replace a layer by the identity within the block."""

    def identity(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(identity, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
