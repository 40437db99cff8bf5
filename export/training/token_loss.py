"""Cross-entropy of next tokens, without materializing the logits of a whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PreTrainedModel

_ROWS = 128
"""Tokens whose logits are in memory at once: 25 MB in fp32 for a vocabulary of 49,152, which stays in the cache."""


def token_loss(model: PreTrainedModel, *, bfloat16: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a function from token ids [batch, length] to the mean of `token_losses`, a scalar."""
    losses = token_losses(model, bfloat16=bfloat16)
    return lambda ids: losses(ids).mean()


def token_losses(
    model: PreTrainedModel, *, bfloat16: bool = False, vocabulary: int | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function from token ids [batch, length] to the negative log-probability of every token after a row's
    first: fp32 [batch * (length - 1)], in nats, row by row.

    Where the head is a frozen linear layer (checked on the model itself), losses and gradients are computed together,
    in chunks of rows: the logits are computed once and never kept.

    Args:
        model: A causal language model, in evaluation mode while this function runs.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
        vocabulary: Number of logits to use, the tokenizer's size; None includes padding.
    """
    head = linear_head(model)
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


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 matrices in hardware, at 2 to 4 times the speed of fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the output layer if it computes the logits from the last hidden state alone, else None."""
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
    """Cross-entropy of each row of softmax(hidden @ weight.T + bias). Only `hidden` gets a gradient,
    (p - onehot) @ weight, which is saved instead of the logits and scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = functional.linear(hidden[rows], weight, bias).float()
            columns = targets[rows, None]
            norm = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (norm - logits.gather(1, columns)).squeeze(1)
            if gradients is not None:
                errors = logits.sub_(norm).exp_()
                errors.scatter_add_(1, columns, errors.new_full(columns.shape, -1.0))
                gradients[rows] = errors.to(weight.dtype) @ weight
        if gradients is not None:
            ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * outputs[0][:, None]).to(gradients.dtype), None, None, None
