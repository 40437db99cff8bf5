"""QLoRA (Dettmers et al., arXiv 2305.14314): fp32 adapters on a frozen base in 4 bits (bitsandbytes' NF4).

A linear layer takes 4.13 bits per weight instead of 32; its weights are dequantized, one layer at a time, where they
are used. The embedding, the head and the norms stay in fp32. As activations take most of the memory, they are kept only
between layers (`lora.attach_adapters`, recompute). Both make a step slower.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from transformers.pytorch_utils import Conv1D

from edgemix.errors import InputError
from edgemix.export.models.loading import load_model, load_skeleton
from edgemix.export.training.token_loss import has_fast_bfloat16
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from torch import nn
    from transformers import PreTrainedModel

    from edgemix.export.models.location import Location

BLOCK = 64
"""Weights that share a scale; bitsandbytes takes them from the flattened matrix."""

_MAX_RELATIVE_ERROR = 0.17
"""Largest error of a weight, as a fraction of its block's largest weight: half the widest gap between NF4's 16 values
is 0.152, and the scales are stored in 8 bits themselves.
"""
_MAX_MEMORY_FRACTION = 0.6
"""Largest fraction of the free memory for a model in fp32; a larger one leaves too little for the activations."""


def load_base(location: Location, *, four_bit: bool, progress: Progress = NO_PROGRESS) -> PreTrainedModel:
    """Load the model that adapters are trained on; see `loading.load_model`.

    Args:
        location: The model.
        four_bit: Keep its linear layers in 4 bits. They are quantized as they are read, so that the fp32 model is never
            whole in memory; a GGUF file is read completely first.
        progress: Progress callback, which also receives notes on layers that stay in fp32 and on memory.

    Raises:
        InputError: The model cannot be read, or no layer can be kept in 4 bits.
    """
    skeleton = load_skeleton(location)
    if not four_bit:
        if note := _memory_note(sum(each.numel() for each in skeleton.parameters())):
            progress.log(f"{location.name}: {note}")
        return load_model(location)
    supported, unsupported = split_linears(skeleton)
    if not supported:
        raise InputError(
            f"{location.name}: bitsandbytes can keep none of its linear layers in 4 bits",
            "Leave --qlora out.",
        )
    if unsupported:
        progress.log(f"{location.name}: {len(unsupported)} linear layers stay in fp32: {_abbreviated(unsupported)}")
    if location.gguf:
        return quantize_linears(load_model(location))
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_compute_dtype(),
        llm_int8_skip_modules=[*unsupported, *_heads(skeleton)],
    )
    model = load_model(location, quantization=config)
    for layer in _quantized(model):
        _prevent_repacking(layer)
    return model


class Linears(NamedTuple):
    """Names of a model's linear layers, without its head.

    Attributes:
        supported: Layers that bitsandbytes quantizes to 4 bits within NF4's error.
        unsupported: The others.
    """

    supported: list[str]
    unsupported: list[str]


def split_linears(model: PreTrainedModel) -> Linears:
    """Determine which linear layers bitsandbytes can keep in 4 bits, by trying each shape on random weights."""
    heads = _heads(model)
    shapes = {
        name: (module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name not in heads
    }
    fits = {name: survives_nf4(*shape) for name, shape in shapes.items()}
    return Linears([name for name, fit in fits.items() if fit], [name for name, fit in fits.items() if not fit])


@cache
def survives_nf4(rows: int, columns: int) -> bool:
    """Return whether weights of this shape are dequantized within NF4's error. On the CPU, bitsandbytes 0.50 uses a
    wrong scale where a block crosses the end of a row.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if columns % BLOCK:
        return False
    rows = min(rows, 4 * BLOCK)  # enough to show the error
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weights, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    blocks = weights.reshape(-1, BLOCK)
    errors = (dequantize_4bit(codes, state).reshape(-1, BLOCK) - blocks).abs().amax(1)
    return bool((errors <= _MAX_RELATIVE_ERROR * blocks.abs().amax(1)).all())


def quantize_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the supported linear layers of a model in memory by NF4 layers, one after the other."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in split_linears(model).supported:
        layer = model.get_submodule(name)
        weight = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
        rows, columns = weight.shape
        new = Linear4bit(
            columns, rows, layer.bias is not None, compute_dtype=_compute_dtype(), quant_type="nf4", device="meta"
        )
        new.weight = Params4bit(weight.contiguous(), quant_type="nf4", module=new).to("cpu")
        new.bias = layer.bias
        _prevent_repacking(new)
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # peft checks this attribute
    return model.eval().requires_grad_(False)


def is_in_four_bits(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False))


def _prevent_repacking(layer: Linear4bit) -> None:
    """Keep bitsandbytes from repacking weights. On CPUs with bfloat16 it does so in the first forward pass without
    gradients, for a faster product; layers with repacked weights never propagate gradients again.
    """
    layer.support_avx512bf16_for_cpu = False


def _quantized(model: PreTrainedModel) -> list[Linear4bit]:
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _heads(model: PreTrainedModel) -> list[str]:
    head: nn.Module | None = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def _compute_dtype() -> torch.dtype:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def _memory_note(parameters: int) -> str | None:
    """Return a warning if a model of this many parameters takes too much of the free memory in fp32, else None."""
    needed, free = 4 * parameters, psutil.virtual_memory().available
    if needed <= _MAX_MEMORY_FRACTION * free:
        return None
    return (
        f"takes {needed / 1e9:.1f} GB in fp32, and {free / 1e9:.1f} GB are free; --qlora keeps it in 4 bits, which "
        "takes about a fifth"
    )


def _abbreviated(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
