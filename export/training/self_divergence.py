"""Divergence of a modified model from the original, by next-token distributions: the loss of recovery training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgemix.export.training.token_loss import linear_head

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

_ROWS = 256


def self_divergence(
    teacher: PreTrainedModel, student: PreTrainedModel, *, bfloat16: bool
) -> Callable[[Tensor], Tensor]:
    """Return a function from token ids [batch, length] to the mean KL(teacher || student) per token, in nats.

    Args:
        teacher: The original model.
        student: The modified model, with the same, frozen head.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
    """
    head = linear_head(teacher)

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
            if head is None:
                with torch.no_grad():
                    expected = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
                found = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
                return functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean()
            with torch.no_grad():
                expected = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found = student.base_model(input_ids=ids, use_cache=False).last_hidden_state
            dtype = torch.bfloat16 if bfloat16 else head.weight.dtype
            bias = None if head.bias is None else head.bias.detach().to(dtype)
            rows = (found.flatten(0, 1).to(dtype), expected.flatten(0, 1).to(dtype))
            mean: Tensor = _HeadDivergence.apply(*rows, head.weight.detach().to(dtype), bias)
            return mean

    return loss


class _HeadDivergence(torch.autograd.Function):  # type: ignore[misc]
    """Mean KL between the distributions that one head computes from two hidden states [rows, hidden], in chunks of
    rows. Only the student's hidden states, the first argument, get a gradient: (q - p) @ weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, expected: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            q = functional.linear(hidden[rows], weight, bias).float().log_softmax(-1)
            p = functional.linear(expected[rows], weight, bias).float().log_softmax(-1)
            probabilities = p.exp()
            total += (probabilities * (p - q)).sum()
            gradient[rows] = (q.exp_() - probabilities).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None
