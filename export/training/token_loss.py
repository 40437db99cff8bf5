"""The cross-entropy of next tokens, without holding logits as wide as the vocabulary for a whole batch."""

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
    """A function from token ids [batch, length] to the mean of `token_losses`."""
    losses = token_losses(model, bfloat16=bfloat16)
    return lambda ids: losses(ids).mean()


def token_losses(
    model: PreTrainedModel, *, bfloat16: bool = False, vocabulary: int | None = None
) -> Callable[[Tensor], Tensor]:
    """A function from token ids [batch, length] to the negative log-probability of every token after a row's first:
    fp32 [batch * (length - 1)], nats, row by row.

    Where the head is frozen and nothing but a linear layer (checked on the model itself), losses and their slopes are
    made together, some rows at a time: the logits are computed once and never kept.

    Args:
        model: A causal language model, in evaluation mode while this function runs.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
        vocabulary: How many logits count: those of the tokenizer's tokens; None takes padding as well.
    """
    head = plain_head(model)
    if head is None or head.weight.requires_grad:

        def losses(ids: Tensor) -> Tensor:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1, :vocabulary]
            return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    else:
        dtype = torch.bfloat16 if bfloat16 else head.weight.dtype
        weight = head.weight.detach()[:vocabulary].to(dtype)
        bias = None if head.bias is None else head.bias.detach()[:vocabulary].to(dtype)

        def losses(ids: Tensor) -> Tensor:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            rows = hidden.flatten(0, 1).to(dtype)
            return _FrozenHeadLosses.apply(rows, weight, bias, ids[:, 1:].flatten())

    def in_precision(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
            return losses(ids)

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


class _FrozenHeadLosses(torch.autograd.Function):  # type: ignore[misc]
    """Each row's cross-entropy of softmax(hidden @ weight.T + bias); only `hidden` gets a gradient,
    (p - onehot) @ weight, which is kept in the place of the logits until its rows' factors are known.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = functional.linear(hidden[rows], weight, bias).float()
            wanted = targets[rows, None]
            norm = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (norm - logits.gather(1, wanted)).squeeze(1)
            if slopes is not None:
                errors = logits.sub_(norm).exp_()
                errors.scatter_add_(1, wanted, errors.new_full(wanted.shape, -1.0))
                slopes[rows] = errors.to(weight.dtype) @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * outputs[0][:, None]).to(slopes.dtype), None, None, None
