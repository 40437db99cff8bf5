"""The student's loss through its output layer, without the logits of a whole batch and all that autograd would keep.

Loss and gradients are made together, some rows at a time, in two buffers that every step uses again: three matrix
products a row, which is the least there is, and two passes of a vector processor. Measured with a vocabulary of 49,152,
fresh memory for each product took as long as the product.

A divergence between events looks at the student's logits z through log q_i of the top tokens and log q_t of the tail
only. With g its slopes in these and G their sum, the slopes in the logits are

    g_i - G q_i                for a top token i
    q_v (g_t / q_t - G)        for a token v of the tail

so whatever the divergence, the whole vocabulary needs no more than its softmax, scaled.
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

_ROWS = 1024
"""Rows whose logits are alive at once: 100 MB in bfloat16 for a vocabulary of 49,152."""
_CACHED_ROWS = 64
"""Rows that a CPU takes through the softmax at once: they stay in its cache."""
_COLUMNS = 4096
"""Rows of the head whose gradient is made at once."""
_TINY = 1e-30
"""Probabilities below this are this, where a logarithm is taken."""


def distillation_loss(
    model: PreTrainedModel, objective: Objective, vocabulary: int, *, bfloat16: bool = False
) -> Callable[[Tensor, TopK], Tensor]:
    """A function from token ids [batch, length] and the teacher's distributions after each token but the last, by rows
    [batch * (length - 1)] at the objective's temperature, to the mean loss, a scalar.

    Gradients go to all that is trainable. Where logits are nothing but a linear layer's (checked on the model itself),
    they are never held for more than `_ROWS` tokens.

    Args:
        model: The student.
        objective: What it minimises.
        vocabulary: The tokenizer's; logits beyond it are padding.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
    """
    head = linear_head(model)
    if head is None:

        def whole(ids: Tensor, teacher: TopK) -> Tensor:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1, :vocabulary]
            return _plain_loss(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), teacher, objective)

        return whole
    workspace = _Workspace()

    def by_rows(ids: Tensor, teacher: TopK) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        hidden = hidden.to(torch.bfloat16 if bfloat16 else head.weight.dtype)
        targets = ids[:, 1:].flatten()
        weight, bias = _cut(head.weight, vocabulary), None if head.bias is None else _cut(head.bias, vocabulary)
        loss: Tensor = _HeadLoss.apply(hidden, weight, bias, _Task(targets, teacher, objective, workspace))
        return loss

    return by_rows


def _cut(parameter: Tensor, vocabulary: int) -> Tensor:
    """Without the padding's rows; whole as it is, since a slice's gradient is copied."""
    return parameter if len(parameter) == vocabulary else parameter[:vocabulary]


def _plain_loss(logits: Tensor, targets: Tensor, teacher: TopK, objective: Objective) -> Tensor:
    own = functional.cross_entropy(logits, targets)
    temperature = objective.temperature
    apart = divergence_from_top_k(teacher, logits, objective.kind, temperature, objective.skew)
    return (1 - objective.alpha) * own + objective.alpha * temperature**2 * apart


class _Workspace:
    """Buffers by name, made when they are first asked for and whenever more is needed."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A buffer [rows, columns] of any content, of the type and on the device of `like`."""
        rows, columns = shape
        held = self._buffers.get(name)
        fits = held is not None and (held.dtype, held.device) == (like.dtype, like.device)
        if held is None or not fits or held.numel() < rows * columns:
            held = self._buffers[name] = like.new_empty(rows * columns)
        return held[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class _Task:
    """What the rows of a batch are to become: targets int64 [rows], teacher [rows]."""

    targets: Tensor
    teacher: TopK
    objective: Objective
    workspace: _Workspace

    def slopes(self, logits: Tensor, start: int) -> Tensor:
        """Put in the place of logits [rows, vocabulary], of the rows from `start` on, the slopes of the mean
        objective over all rows; returns its sum over the rows at hand.
        """
        total = torch.zeros((), device=logits.device)
        step = _CACHED_ROWS if logits.device.type == "cpu" else len(logits)
        for at in range(0, len(logits), step):
            some = logits[at : at + step]
            rows = slice(start + at, start + at + len(some))
            total += self._slopes_of_some(some, self.targets[rows, None], self.teacher[rows])
        return total

    def _slopes_of_some(self, logits: Tensor, targets: Tensor, teacher: TopK) -> Tensor:
        temperature, alpha, count = self.objective.temperature, self.objective.alpha, len(self.targets)
        share, own_share = alpha * temperature / count, (1 - alpha) / count  # T^2, and 1/T from the logits' scale
        total, vocabulary = torch.zeros((), device=logits.device), logits.shape[1]
        shape = (len(logits), vocabulary)
        plain = self.workspace.get("plain", shape, logits) if own_share and temperature != 1 else None
        if plain is not None:
            torch.softmax(logits, -1, out=plain)
            total -= (1 - alpha) * _log(plain.gather(1, targets)).sum()
        if temperature != 1:
            logits /= temperature
        q = self.workspace.get("softmax", shape, logits)
        torch.softmax(logits, -1, out=q)
        if own_share and plain is None:
            total -= (1 - alpha) * _log(q.gather(1, targets)).sum()

        top = q.gather(1, teacher.ids).float()
        places = teacher.ids + vocabulary * torch.arange(len(q), device=q.device)[:, None]
        q.view(-1)[places] = 0  # scatter_ would copy all of it
        tail = q.sum(-1, keepdim=True).float().clamp_(min=_TINY)
        apart, slopes = self._apart(torch.cat([top, tail], 1), teacher)
        total += alpha * temperature**2 * apart

        mass = slopes.sum(-1, keepdim=True)
        same = own_share if plain is None else 0.0
        at_top = share * (slopes[:, :-1] - mass * top) + same * top
        in_tail = share * (slopes[:, -1:] / tail - mass) + same
        torch.mul(q, in_tail.to(q.dtype), out=logits)
        logits.view(-1)[places] = at_top.to(q.dtype)
        if plain is not None:
            logits.add_(plain, alpha=own_share)
        if own_share:
            logits.scatter_add_(1, targets, logits.new_full(targets.shape, -own_share))
        return total

    def _apart(self, events: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
        """The divergence, summed over rows, and its slopes in the logarithms of the student's events [rows, k + 1]."""
        events = events / events.sum(-1, keepdim=True)  # what rounding the softmax has moved
        with torch.enable_grad():
            student = _log(events).requires_grad_()
            apart = divergence_of_events(teacher.events, student, self.objective.kind, self.objective.skew).sum()
            (slopes,) = torch.autograd.grad(apart, student)
        return apart.detach(), slopes


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """The objective's mean over rows, from softmax(hidden @ weight.T + bias)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> Tensor:
        wanted = ctx.needs_input_grad
        matrix = weight.to(hidden.dtype)
        slope_hidden = torch.empty_like(hidden) if wanted[0] else None
        slope_weight = torch.zeros_like(weight) if wanted[1] else None
        slope_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            some = hidden[start : start + _ROWS]
            logits = task.workspace.get("logits", (len(some), len(matrix)), some)
            torch.mm(some, matrix.t(), out=logits)
            if bias is not None:
                logits += bias.to(logits.dtype)
            total += task.slopes(logits, start)
            if slope_hidden is not None:
                torch.mm(logits, matrix, out=slope_hidden[start : start + _ROWS])
            if slope_weight is not None:
                for column in range(0, len(matrix), _COLUMNS):
                    columns = slice(column, column + _COLUMNS)
                    slope_weight[columns] += logits[:, columns].t() @ some
            if slope_bias is not None:
                slope_bias += logits.sum(0, dtype=slope_bias.dtype)
        ctx.slopes = (slope_hidden, slope_weight, slope_bias)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        unscaled = bool(scale == 1)
        slopes = (each if each is None or unscaled else each * scale.to(each.dtype) for each in ctx.slopes)
        ctx.slopes = ()
        return (*slopes, None)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp(min=_TINY).log()
