"""The student's loss through its output layer, without materializing a batch's logits or autograd's intermediates.

Loss and gradients are computed together in chunks of rows, in two buffers that every step reuses: three matrix products
and two elementwise passes. With a vocabulary of 49,152, allocating memory for each product took as long as the product.

A divergence between events depends on the student's logits z only through log q_i of the top tokens and log q_t of the
tail. With g its gradients in these and G their sum, the gradients in the logits are

    g_i - G q_i                for a top token i
    q_v (g_t / q_t - G)        for a token v of the tail

so for any divergence, the whole vocabulary needs only its softmax, scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgemix.export.training.losses import TopK, divergence_from_top_k, divergence_of_events
from edgemix.export.training.token_loss import linear_head

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from edgemix.export.training.losses import Objective

ROWS = 1024
"""Rows whose logits are in memory at once: 100 MB in bfloat16 for a vocabulary of 49,152."""
CACHED_ROWS = 64
"""Rows per softmax on a CPU, which stay in its cache."""
COLUMNS = 4096
"""Rows of the head's weight whose gradient is computed at once."""
_TINY = 1e-30
"""Floor of probabilities before taking the logarithm."""


def objective_loss(
    model: PreTrainedModel, objective: Objective, vocabulary: int, *, bfloat16: bool = False
) -> Callable[[Tensor, TopK], Tensor]:
    """Return a function from token ids [batch, length] and the teacher's distributions after each token except the
    last, rows [batch * (length - 1)] at the objective's temperature, to the mean loss, a scalar.

    All trainable parameters get gradients. Where the head is a linear layer (checked on the model itself), logits of at
    most `ROWS` tokens are in memory.

    Args:
        model: The student.
        objective: The objective to minimize.
        vocabulary: Size of the tokenizer's vocabulary; logits beyond it are padding.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
    """
    head = linear_head(model)
    if head is None:

        def whole(ids: Tensor, teacher: TopK) -> Tensor:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1, :vocabulary]
            return _loss_from_logits(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), teacher, objective)

        return whole
    workspace = _Workspace()

    def by_rows(ids: Tensor, teacher: TopK) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        hidden = hidden.to(torch.bfloat16 if bfloat16 else head.weight.dtype)
        targets = ids[:, 1:].flatten()
        weight = _without_padding(head.weight, vocabulary)
        bias = None if head.bias is None else _without_padding(head.bias, vocabulary)
        loss: Tensor = _HeadLoss.apply(hidden, weight, bias, _Targets(targets, teacher, objective, workspace))
        return loss

    return by_rows


def _without_padding(parameter: Tensor, vocabulary: int) -> Tensor:
    """Return a parameter without the padding's rows; not sliced without need, since a slice's gradient is copied."""
    return parameter if len(parameter) == vocabulary else parameter[:vocabulary]


def _loss_from_logits(logits: Tensor, targets: Tensor, teacher: TopK, objective: Objective) -> Tensor:
    own = functional.cross_entropy(logits, targets)
    temperature = objective.temperature
    divergence = divergence_from_top_k(teacher, logits, objective.kind, temperature, objective.skew)
    return (1 - objective.alpha) * own + objective.alpha * temperature**2 * divergence


class _Workspace:
    """Reusable buffers by name, allocated on first use and whenever a larger one is needed."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Return an uninitialized buffer [rows, columns] of the dtype and device of `like`."""
        rows, columns = shape
        held = self._buffers.get(name)
        fits = held is not None and (held.dtype, held.device) == (like.dtype, like.device)
        if held is None or not fits or held.numel() < rows * columns:
            held = self._buffers[name] = like.new_empty(rows * columns)
        return held[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class _Targets:
    """Targets of a batch's rows: next tokens int64 [rows], the teacher's distributions [rows], and the objective."""

    targets: Tensor
    teacher: TopK
    objective: Objective
    workspace: _Workspace

    def gradients(self, logits: Tensor, start: int) -> Tensor:
        """Replace logits [rows, vocabulary] of the rows from `start` on by the gradients of the mean objective over all
        rows, and return the objective's sum over these rows.
        """
        total = torch.zeros((), device=logits.device)
        step = CACHED_ROWS if logits.device.type == "cpu" else len(logits)
        for at in range(0, len(logits), step):
            chunk = logits[at : at + step]
            rows = slice(start + at, start + at + len(chunk))
            total += self._chunk_gradients(chunk, self.targets[rows, None], self.teacher[rows])
        return total

    def _chunk_gradients(self, logits: Tensor, targets: Tensor, teacher: TopK) -> Tensor:
        temperature, alpha, count = self.objective.temperature, self.objective.alpha, len(self.targets)
        teacher_weight, text_weight = (
            alpha * temperature / count,
            (1 - alpha) / count,
        )  # T^2, and 1/T from the logits' scale
        total, vocabulary = torch.zeros((), device=logits.device), logits.shape[1]
        shape = (len(logits), vocabulary)
        plain = self.workspace.get("plain", shape, logits) if text_weight and temperature != 1 else None
        if plain is not None:
            torch.softmax(logits, -1, out=plain)
            total -= (1 - alpha) * _log(plain.gather(1, targets)).sum()
        if temperature != 1:
            logits /= temperature
        q = self.workspace.get("softmax", shape, logits)
        torch.softmax(logits, -1, out=q)
        if text_weight and plain is None:
            total -= (1 - alpha) * _log(q.gather(1, targets)).sum()

        top = q.gather(1, teacher.ids).float()
        positions = teacher.ids + vocabulary * torch.arange(len(q), device=q.device)[:, None]
        q.view(-1)[positions] = 0  # scatter_ would copy all of it
        tail = q.sum(-1, keepdim=True).float().clamp_(min=_TINY)
        divergence, gradients = self._divergence(torch.cat([top, tail], 1), teacher)
        total += alpha * temperature**2 * divergence

        total_gradient = gradients.sum(-1, keepdim=True)
        text_weight_in_q = text_weight if plain is None else 0.0
        at_top = teacher_weight * (gradients[:, :-1] - total_gradient * top) + text_weight_in_q * top
        in_tail = teacher_weight * (gradients[:, -1:] / tail - total_gradient) + text_weight_in_q
        torch.mul(q, in_tail.to(q.dtype), out=logits)
        logits.view(-1)[positions] = at_top.to(q.dtype)
        if plain is not None:
            logits.add_(plain, alpha=text_weight)
        if text_weight:
            logits.scatter_add_(1, targets, logits.new_full(targets.shape, -text_weight))
        return total

    def _divergence(self, events: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
        """Return the divergence summed over rows, and its gradients in the student's log-events [rows, k + 1]."""
        events = events / events.sum(-1, keepdim=True)  # rounding the softmax changed the sum
        with torch.enable_grad():
            student = _log(events).requires_grad_()
            divergence = divergence_of_events(teacher.events, student, self.objective.kind, self.objective.skew).sum()
            (gradients,) = torch.autograd.grad(divergence, student)
        return divergence.detach(), gradients


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """The objective's mean over rows of softmax(hidden @ weight.T + bias)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: _Targets) -> Tensor:
        needed = ctx.needs_input_grad
        matrix = weight.to(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden) if needed[0] else None
        weight_gradient = torch.zeros_like(weight) if needed[1] else None
        bias_gradient = torch.zeros_like(bias) if bias is not None and needed[2] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), ROWS):
            chunk = hidden[start : start + ROWS]
            logits = targets.workspace.get("logits", (len(chunk), len(matrix)), chunk)
            torch.mm(chunk, matrix.t(), out=logits)
            if bias is not None:
                logits += bias.to(logits.dtype)
            total += targets.gradients(logits, start)
            if hidden_gradient is not None:
                torch.mm(logits, matrix, out=hidden_gradient[start : start + ROWS])
            if weight_gradient is not None:
                for column in range(0, len(matrix), COLUMNS):
                    columns = slice(column, column + COLUMNS)
                    weight_gradient[columns] += logits[:, columns].t() @ chunk
            if bias_gradient is not None:
                bias_gradient += logits.sum(0, dtype=bias_gradient.dtype)
        ctx.gradients = (hidden_gradient, weight_gradient, bias_gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        unscaled = bool(scale == 1)
        gradients = (each if each is None or unscaled else each * scale.to(each.dtype) for each in ctx.gradients)
        ctx.gradients = ()
        return (*gradients, None)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp(min=_TINY).log()
