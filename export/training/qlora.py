"""QLoRA (Dettmers et al., arXiv 2305.14314): the frozen base in 4 bits (bitsandbytes' NF4), adapters in fp32 on it.

A linear layer takes 4.13 bits a weight in place of 32. Its weights are expanded, one layer at a time, wherever they are
used. The embedding, the head and the norms stay as they are. As most of the memory is the activations', none are kept
but between layers (`adapters.adapted`, recompute). Both make a step longer.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from transformers.pytorch_utils import Conv1D

from edgemix.errors import InputError
from edgemix.export.models.loading import load_model, load_skeleton
from edgemix.export.training.token_loss import bfloat16_pays
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from torch import nn
    from transformers import PreTrainedModel

    from edgemix.export.models.loading import Location

BLOCK = 64
"""Weights that share a scale; bitsandbytes takes them from rows laid end to end."""

_LARGEST_ERROR = 0.17
"""Of a weight, in its block's largest: half the widest gap between NF4's 16 values is 0.152, and the scales are stored
in 8 bits themselves.
"""
_SHARE_OF_MEMORY = 0.6
"""A model that takes more than this of the free memory in fp32 leaves too little for the activations."""


def load_base(location: Location, *, four_bit: bool, progress: Progress = NO_PROGRESS) -> PreTrainedModel:
    """Read the model that adapters are trained on; see `members.load_model`.

    Args:
        location: Where it lies.
        four_bit: Keep its linear layers in 4 bits. They are quantised as they are read, so that the whole model never
            lies in memory; a GGUF file is read whole first.
        progress: Told what stays in fp32, and if 4 bits would help.

    Raises:
        InputError: It cannot be read, or no layer can be kept in 4 bits.
    """
    skeleton = load_skeleton(location)
    if not four_bit:
        if note := _memory_note(sum(each.numel() for each in skeleton.parameters())):
            progress.log(f"{location.name}: {note}")
        return load_model(location)
    fitting, others = split_linears(skeleton)
    if not fitting:
        raise InputError(
            f"{location.name}: bitsandbytes can keep none of its linear layers in 4 bits",
            "Leave --qlora out.",
        )
    if others:
        progress.log(f"{location.name}: {len(others)} linear layers stay in fp32: {_some(others)}")
    if location.gguf:
        return quantize_linears(load_model(location))
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_compute_dtype(),
        llm_int8_skip_modules=[*others, *_heads(skeleton)],
    )
    model = load_model(location, quantization=config)
    for layer in _quantized(model):
        _never_pack(layer)
    return model


class Linears(NamedTuple):
    """Names of a model's linear layers, but for its head.

    Attributes:
        fitting: Those that come back from 4 bits as near as NF4 promises.
        others: Those that do not.
    """

    fitting: list[str]
    others: list[str]


def split_linears(model: PreTrainedModel) -> Linears:
    """Which linear layers bitsandbytes can keep in 4 bits, by trying each shape on random weights."""
    heads = _heads(model)
    shapes = {
        name: (module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name not in heads
    }
    fits = {name: exact(*shape) for name, shape in shapes.items()}
    return Linears([name for name, fit in fits.items() if fit], [name for name, fit in fits.items() if not fit])


@cache
def exact(rows: int, columns: int) -> bool:
    """Whether weights of this shape survive 4 bits. bitsandbytes 0.50 finds the right codes on the CPU, but expands
    them with a wrong scale where a block goes over a row's end.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if columns % BLOCK:
        return False
    rows = min(rows, 4 * BLOCK)  # enough to see it
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weights, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    blocks = weights.reshape(-1, BLOCK)
    errors = (dequantize_4bit(codes, state).reshape(-1, BLOCK) - blocks).abs().amax(1)
    return bool((errors <= _LARGEST_ERROR * blocks.abs().amax(1)).all())


def quantize_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the fitting linear layers of a model in memory by NF4 ones, one after the other."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in split_linears(model).fitting:
        layer = model.get_submodule(name)
        weight = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
        rows, columns = weight.shape
        new = Linear4bit(
            columns, rows, layer.bias is not None, compute_dtype=_compute_dtype(), quant_type="nf4", device="meta"
        )
        new.weight = Params4bit(weight.contiguous(), quant_type="nf4", module=new).to("cpu")
        new.bias = layer.bias
        _never_pack(new)
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # what peft asks for
    return model.eval().requires_grad_(False)


def is_in_four_bits(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False))


def _never_pack(layer: Linear4bit) -> None:
    """Keep bitsandbytes from rearranging weights. It does so, for a faster product on CPUs with bfloat16, the first
    time that no gradient is asked for; a product of rearranged weights has none even where one is asked for later.
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
    return torch.bfloat16 if bfloat16_pays(device) else torch.float32


def _memory_note(parameters: int) -> str | None:
    """What to tell whoever trains a model of so many parameters in fp32, with the memory that is free."""
    needed, free = 4 * parameters, psutil.virtual_memory().available
    if needed <= _SHARE_OF_MEMORY * free:
        return None
    return (
        f"takes {needed / 1e9:.1f} GB in fp32, and {free / 1e9:.1f} GB are free; --qlora keeps it in 4 bits, which "
        "takes about a fifth"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
