"""Divergences of a student's next-token distributions from a teacher's.

With p the teacher's distribution and q the student's, both at a temperature T (softmax of logits / T):

    forward          KL(p || q)                      covers every token that the teacher allows
    reverse          KL(q || p)                      concentrates on the teacher's modes (MiniLLM, arXiv 2306.08543)
    skewed           KL(p || (1 - skew) q + skew p)  forward, with bounded gradients (DistiLLM, arXiv 2402.03898)
    total-variation  1/2 sum |p - q|                 rejection rate of speculative drafts (arXiv 2302.01318)

All are zero only at p = q, and all but the last are in nats. A teacher may be represented by its k most probable tokens
and the total probability of all others (the tail), which then count as one event. Merging events never increases a
divergence (data processing inequality), and it is still zero at equality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from edgemix.recipe.compression import Divergence

_LOWEST = -100.0
"""Floor of a teacher's log-probabilities: e^-100 is zero in fp32, while -inf times zero is NaN."""


class TopK(NamedTuple):
    """A teacher's distributions: the most probable tokens and the tail.

    Attributes:
        ids: int64 [rows, k], distinct within a row.
        log_probabilities: fp32 [rows, k], nats.
        tail: fp32 [rows], the log of the total probability of the tokens not in `ids`; -inf where there are none.
    """

    ids: Tensor
    log_probabilities: Tensor
    tail: Tensor

    def __getitem__(self, rows: slice) -> TopK:  # type: ignore[override]
        return TopK(self.ids[rows], self.log_probabilities[rows], self.tail[rows])

    @property
    def events(self) -> Tensor:
        """Log-probabilities of the k tokens, then of the tail: fp32 [rows, k + 1]."""
        return torch.cat([self.log_probabilities, self.tail[:, None]], 1)


@dataclass(frozen=True)
class Objective:
    """The student's objective, (1 - alpha) CE(y, q_1) + alpha T^2 D(p_T, q_T) (Hinton et al., 1503.02531).

    T^2 keeps the gradients at the scale that they have at T = 1.

    Attributes:
        kind: Name of the divergence D, as in the table above.
        alpha: Weight of the divergence against the text's cross-entropy.
        temperature: T.
        skew: Weight of p in the divergence `skewed`.
    """

    kind: Divergence = "forward"
    alpha: float = 1.0
    temperature: float = 1.0
    skew: float = 0.1


def divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Tensor:
    """Return the mean divergence over rows from logits or log-probabilities [rows, vocabulary]."""
    p, q = (functional.log_softmax(each.float() / temperature, -1) for each in (teacher_logits, student_logits))
    return divergence_of_events(p, q, kind, skew).mean()


def divergence_from_top_k(
    teacher: TopK,
    student_logits: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Tensor:
    """Return the mean divergence over rows from a teacher's top tokens, both at one temperature.

    Args:
        teacher: Distributions at `temperature`; see `top_k`.
        student_logits: [rows, vocabulary].
        kind: Name of the divergence.
        temperature: Temperature of the student's distributions.
        skew: Weight of the teacher in the divergence `skewed`.
    """
    scaled = student_logits.float() / temperature
    norm = scaled.logsumexp(-1, keepdim=True)
    top = scaled.gather(1, teacher.ids) - norm
    if top.shape == scaled.shape:  # there is no tail
        return divergence_of_events(teacher.log_probabilities, top, kind, skew).mean()
    # The tail is summed directly: one minus the others would lose all precision where the tail is small.
    tail = scaled.scatter(1, teacher.ids, -math.inf).logsumexp(-1, keepdim=True) - norm
    return divergence_of_events(teacher.events, torch.cat([top, tail], 1), kind, skew).mean()


def divergence_of_events(teacher: Tensor, student: Tensor, kind: Divergence, skew: float = 0.1) -> Tensor:
    """Return each row's divergence, [rows], from normalized log-probabilities of the same events [rows, events]."""
    p = teacher.clamp(min=_LOWEST)
    if kind == "forward":
        return (p.exp() * (p - student)).sum(-1)
    if kind == "reverse":
        return (student.exp() * (student - p)).sum(-1)
    if kind == "skewed":
        mixture = torch.logaddexp(student + math.log1p(-skew), p + math.log(skew))
        return (p.exp() * (p - mixture)).sum(-1)
    return 0.5 * (p.exp() - student.exp()).abs().sum(-1)


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Return the k most probable tokens of each distribution, and the tail, at a temperature.

    Args:
        logits: Logits or log-probabilities [rows, vocabulary].
        k: Tokens to keep, limited to the vocabulary size.
        temperature: Applied before truncation: the tail at another temperature does not follow from the tail.
    """
    return top_k_of_probabilities((logits.float() / temperature).softmax(-1), k)


def top_k_of_probabilities(probabilities: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Compute `top_k` from probabilities fp32 [rows, vocabulary] at temperature 1, which are overwritten."""
    powers = probabilities if temperature == 1 else probabilities.pow_(1 / temperature)
    top, ids = powers.topk(min(k, powers.shape[1]), sorted=False)
    rest = powers.scatter_(1, ids, 0).sum(-1)
    norm = (top.sum(-1) + rest).log()
    return TopK(ids, top.log() - norm[:, None], rest.log() - norm)
