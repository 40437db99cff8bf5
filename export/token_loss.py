"""The mean cross-entropy of next tokens, without holding logits as wide as the vocabulary for a whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PreTrainedModel

_ROWS = 128
"""Tokens whose logits are alive at once: 25 MB in fp32 for a vocabulary of 49,152, which stays in the cache."""


def token_loss(model: PreTrainedModel, *, bfloat16: bool = False) -> Callable[[Tensor], Tensor]:
    """A function from token ids [batch, length] to the mean negative log-probability of every token after the first.

    Where the head is frozen and nothing but a linear layer (checked on the model itself), loss and gradient are made
    together, some rows at a time: the logits are computed once and never kept.

    Args:
        model: A causal language model, in evaluation mode while this function runs.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
    """
    head = plain_head(model)
    if head is None or head.weight.requires_grad:

        def mean_loss(ids: Tensor) -> Tensor:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    else:
        dtype = torch.bfloat16 if bfloat16 else head.weight.dtype
        weight = head.weight.detach().to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype)

        def mean_loss(ids: Tensor) -> Tensor:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            rows = hidden.flatten(0, 1).to(dtype)
            return _FrozenHeadLoss.apply(rows, weight, bias, ids[:, 1:].flatten())

    def in_precision(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
            return mean_loss(ids)

    return in_precision


def bfloat16_pays(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware: 2 to 4 times the speed of fp32; without, slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, if logits are just what it makes of the last hidden state."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or model.base_model is model:
        return None
    ids = torch.arange(8, device=head.weight.device)[None]
    with torch.no_grad():
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.in_features:
            return None
        logits = model(input_ids=ids, use_cache=False).logits
        return head if torch.allclose(head(hidden), logits, rtol=1e-4, atol=1e-4) else None


class _FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """Mean cross-entropy of softmax(hidden @ weight.T + bias); only `hidden` gets a gradient, (p - onehot) @ weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = functional.linear(hidden[rows], weight, bias).float()
            wanted_ids = targets[rows, None]
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, wanted_ids)).sum()
            if gradient is not None:
                slopes = logits.sub_(norm).exp_()
                slopes.scatter_add_(1, wanted_ids, slopes.new_full(wanted_ids.shape, -1.0))
                gradient[rows] = slopes.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None
