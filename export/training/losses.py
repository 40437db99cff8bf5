"""How far a student's next-token distributions are from a teacher's, and the tokens' own cross-entropy.

With p the teacher's distribution and q the student's, both at a temperature T (softmax of logits / T):

    forward          KL(p || q)                      covers all that the teacher may say
    reverse          KL(q || p)                      keeps to what the teacher would say (MiniLLM, arXiv 2306.08543)
    skewed           KL(p || (1 - skew) q + skew p)  forward, with bounded gradients (DistiLLM, arXiv 2402.03898)
    total-variation  1/2 sum |p - q|                 share of drafts that speculation rejects (arXiv 2302.01318)

All are zero at p = q and nowhere else, and are nats but the last. A teacher may be known by its k most probable tokens
and the mass of all others, which then count as one event. That merges events of both sides, so each divergence is at
most what it is over the whole vocabulary (data processing inequality), and still zero at equality.
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
"""Log-probabilities of a teacher below this are this: e^-100 is zero in fp32, while -inf times zero is no number."""


class TopK(NamedTuple):
    """A teacher's distributions, by their most probable tokens.

    Attributes:
        ids: int64 [rows, k], no id twice in a row.
        log_probabilities: fp32 [rows, k], nats.
        tail: fp32 [rows], the log of the mass of all tokens that are not in `ids`; -inf where there are none.
    """

    ids: Tensor
    log_probabilities: Tensor
    tail: Tensor

    def __getitem__(self, rows: slice) -> TopK:  # type: ignore[override]
        return TopK(self.ids[rows], self.log_probabilities[rows], self.tail[rows])

    @property
    def events(self) -> Tensor:
        """Log-probabilities of the k tokens, then of the rest as one: fp32 [rows, k + 1]."""
        return torch.cat([self.log_probabilities, self.tail[:, None]], 1)


@dataclass(frozen=True)
class Objective:
    """(1 - alpha) CE(y, q_1) + alpha T^2 D(p_T, q_T): what the student minimises (Hinton et al., 1503.02531).

    T^2 keeps the gradients' size where it is at T = 1.

    Attributes:
        kind: D, by its name in the table above.
        alpha: The teacher's share, against that of the text.
        temperature: T.
        skew: Of the divergence `skewed`.
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
    """Mean divergence over rows, from both sides' logits [rows, vocabulary] (log-probabilities do as well)."""
    p, q = (functional.log_softmax(each.float() / temperature, -1) for each in (teacher_logits, student_logits))
    return divergence_of_events(p, q, kind, skew).mean()


def divergence_from_top_k(
    teacher: TopK,
    student_logits: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Tensor:
    """Mean divergence over rows from a teacher that is known by its top tokens, at the same temperature.

    Args:
        teacher: Of distributions at `temperature` already; see `top_k`.
        student_logits: [rows, vocabulary].
        kind: See the module.
        temperature: Of the student.
        skew: Of the divergence `skewed`.
    """
    scaled = student_logits.float() / temperature
    norm = scaled.logsumexp(-1, keepdim=True)
    top = scaled.gather(1, teacher.ids) - norm
    if top.shape == scaled.shape:  # there is no tail
        return divergence_of_events(teacher.log_probabilities, top, kind, skew).mean()
    # The tail is a sum of its own, not one minus the others: of that, nothing would be left where it is small.
    tail = scaled.scatter(1, teacher.ids, -math.inf).logsumexp(-1, keepdim=True) - norm
    return divergence_of_events(teacher.events, torch.cat([top, tail], 1), kind, skew).mean()


def divergence_of_events(teacher: Tensor, student: Tensor, kind: Divergence, skew: float = 0.1) -> Tensor:
    """The divergence of each row [rows], from log-probabilities of the same events [rows, events] that sum to one."""
    p = teacher.clamp(min=_LOWEST)
    if kind == "forward":
        return (p.exp() * (p - student)).sum(-1)
    if kind == "reverse":
        return (student.exp() * (student - p)).sum(-1)
    if kind == "skewed":
        blend = torch.logaddexp(student + math.log1p(-skew), p + math.log(skew))
        return (p.exp() * (p - blend)).sum(-1)
    return 0.5 * (p.exp() - student.exp()).abs().sum(-1)


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k most probable tokens of each distribution, and the mass of the rest, at a temperature.

    Args:
        logits: [rows, vocabulary]; log-probabilities do as well.
        k: At most the vocabulary counts.
        temperature: Tempering must come first: the rest's mass at another temperature does not follow from its mass.
    """
    return top_k_of_probabilities((logits.float() / temperature).softmax(-1), k)


def top_k_of_probabilities(probabilities: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """As `top_k`, from probabilities fp32 [rows, vocabulary] at temperature 1, which are overwritten."""
    powers = probabilities if temperature == 1 else probabilities.pow_(1 / temperature)
    top, ids = powers.topk(min(k, powers.shape[1]), sorted=False)
    rest = powers.scatter_(1, ids, 0).sum(-1)
    norm = (top.sum(-1) + rest).log()
    return TopK(ids, top.log() - norm[:, None], rest.log() - norm)
