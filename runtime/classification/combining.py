"""Mixtures of distributions over labels, of members that may abstain and may not know every label.

All are computed from log-probabilities (nats). A member that abstains leaves its weight to the others in proportion;
where all abstain, the mixture is the prior. Labels that a member does not know:

- `linear`, P(y) = sum_i w_i P_i(y): it puts no mass on them.
- `log-linear`, P(y) ~ prod_i P_i(y)^w_i: who never heard of a label cannot veto it. The mean of a label is over the
  members that know it, so that a label is judged by those that can.
- `bayes`, P(y) ~ P(y) prod_i (P_i(y) / P(y))^(n w_i): the product of posteriors over the prior, for n members (those of
  weight above zero) whose inputs are independent given y; equal weights are the exponent 1. Who does not know a label
  has no evidence about it, and the prior of those who do is the prior of the labels that they know. Who abstains is no
  evidence either: nothing goes to the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np

from edgemix.errors import InputError
from edgemix.tasks import LabelCombine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.floating]


def check_combine(combine: str) -> None:
    """Raise InputError unless `combine` names a way to mix."""
    if combine not in get_args(LabelCombine):
        raise InputError(f"combine={combine!r} is unknown", f"Choose one of: {', '.join(get_args(LabelCombine))}.")


def combine(
    log_probabilities: Array,
    weights: NDArray[np.float64],
    how: LabelCombine = "linear",
    *,
    known: NDArray[np.bool_] | None = None,
    present: NDArray[np.bool_] | None = None,
    log_prior: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Return a mixture's log-probabilities, float64 [..., labels].

    Args:
        log_probabilities: The members' [members, ..., labels]; what stands at labels that a member does not know, and
            in the rows where it abstains, does not count.
        weights: float64 [members], sum one; those of zero do not count.
        how: See above.
        known: Which labels each member knows [members, labels]; by default all.
        present: Where each member has an answer [members, ...]; by default everywhere.
        log_prior: Of the labels, float64 [labels]; uniform by default.
    """
    members, labels = len(log_probabilities), log_probabilities.shape[-1]
    active = np.count_nonzero(weights)
    known = np.ones((members, labels), np.bool_) if known is None else known
    present = np.ones(log_probabilities.shape[:-1], np.bool_) if present is None else present
    prior = np.full(labels, -np.log(labels)) if log_prior is None else log_prior
    shape = (members, *(1,) * (log_probabilities.ndim - 2))
    shares = np.where(present, weights.reshape(shape), 0.0)[..., None]
    knows = known.reshape(*shape, labels)
    logs = np.where(knows & (shares > 0), log_probabilities, 0.0).astype(np.float64)
    if how == "linear":
        mixed = _linear(logs, shares, knows)
    elif how == "log-linear":
        mixed = _normalized(_geometric(logs, shares, knows))
    else:
        mixed = _normalized(prior + (active * shares * np.where(knows, logs - _priors(prior, knows), 0.0)).sum(axis=0))
    return np.where(shares.sum(axis=0) > 0, mixed, prior)


def _linear(logs: NDArray[np.float64], shares: NDArray[np.float64], knows: NDArray[np.bool_]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        weighted = np.where(knows, logs + np.log(shares), -np.inf)
        total = np.log(np.maximum(shares.sum(axis=0), np.finfo(np.float64).tiny))
        return np.asarray(np.logaddexp.reduce(weighted, axis=0) - total)


def _geometric(logs: NDArray[np.float64], shares: NDArray[np.float64], knows: NDArray[np.bool_]) -> NDArray[np.float64]:
    voters = np.where(knows, shares, 0.0)
    total = voters.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = np.where(voters > 0, voters * logs, 0.0).sum(axis=0) / np.maximum(total, np.finfo(np.float64).tiny)
    return np.where(total > 0, mean, -np.inf)


def _priors(prior: NDArray[np.float64], knows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the prior of each member's labels, [members, ..., labels], normalized over those that it knows."""
    return np.where(knows, prior - np.logaddexp.reduce(np.where(knows, prior, -np.inf), axis=-1, keepdims=True), 0.0)


def _normalized(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    top = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo(np.float64).min)
    with np.errstate(divide="ignore", invalid="ignore"):  # all -inf where all abstain: the prior replaces it
        shifted = scores - top
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def yes_and_no(logits: Array) -> NDArray[np.float64]:
    """Return the log-probabilities of no and yes, float64 [..., labels, 2], of labels that are independent of each
    other, from their logits [..., labels].
    """
    values = logits.astype(np.float64)
    return np.stack([-np.logaddexp(0.0, values), -np.logaddexp(0.0, -values)], axis=-1)
