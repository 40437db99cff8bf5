"""Weights of mixtures over labels that make the right labels most likely.

For linear mixtures by expectation-maximization (Dempster, Laird and Rubin 1977) with a Dirichlet prior. A member that
abstains on an example leaves it to the others: the mixture draws members until one has an opinion. The expected number
of draws of member i is then, with S_n = sum_present w_j p_j(y_n) and W_n = sum_present w_j,

    w_i p_i(y_n) / S_n   where it has an opinion,        w_i / W_n   where it abstains

and the weights are proportional to the draws over all examples, the prior's pseudo-counts added. For the other mixtures
the mean log-likelihood climbs by exponentiated gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_TOLERANCE, _MOST_STEPS = 1e-9, 2_000
_DESCENT_STEPS, _DIFFERENCE = 60, 1e-4


@dataclass(frozen=True)
class WeightFit:
    """Fitted weights.

    Attributes:
        weights: float64 [members], on the simplex.
        counts: float64 [members], the draws of each member over all examples, pseudo-counts included: the Dirichlet
            prior of a later fit to other examples.
    """

    weights: NDArray[np.float64]
    counts: NDArray[np.float64]


def fit_weights(
    log_probabilities: NDArray[np.floating],
    present: NDArray[np.bool_] | None = None,
    prior: NDArray[np.float64] | None = None,
) -> WeightFit:
    """Fit the weights of a linear mixture.

    Args:
        log_probabilities: Each member's of the right label [members, examples]; -inf where it does not know it.
        present: Where each member has an opinion [members, examples]; by default everywhere.
        prior: Pseudo-counts of the members [members]; by default none.

    Raises:
        InputError: There is nothing to fit to: every right label is impossible for all members.
    """
    members, examples = log_probabilities.shape
    present = np.ones((members, examples), np.bool_) if present is None else present
    counts = np.zeros(members) if prior is None else prior
    logs = np.where(present, log_probabilities, -np.inf).astype(np.float64)
    top = logs.max(axis=0, initial=-np.inf)
    usable = np.isfinite(top)  # an example that no member can explain says nothing of the weights
    if not usable.any() and not counts.sum():
        raise InputError("no member knows the label of any example", "Check the names of labels.")
    likelihoods, given = np.exp(logs[:, usable] - top[usable]), present[:, usable]
    weights = (counts + 1 / members) / (counts.sum() + 1)
    draws, before = counts, -np.inf
    for _ in range(_MOST_STEPS):
        mixed, shares = weights @ likelihoods, weights @ given
        with np.errstate(divide="ignore", invalid="ignore"):
            taken = np.where(mixed > 0, likelihoods / mixed, 0.0).sum(axis=1)
            missed = np.where(given | (shares <= 0), 0.0, 1 / shares).sum(axis=1)
        draws = counts + weights * (taken + missed)
        after = float(np.log(mixed[mixed > 0] / shares[mixed > 0]).sum())
        after += float((counts * np.log(np.maximum(weights, 1e-300))).sum())
        weights = draws / draws.sum()
        if after - before < _TOLERANCE * max(1, examples):
            break
        before = after
    return WeightFit(weights, draws)


def climb(score: Callable[[NDArray[np.float64]], float], members: int) -> NDArray[np.float64]:
    """Return weights on the simplex, float64 [members], that make a smooth score large, by exponentiated gradients.

    Args:
        score: Of weights float64 [members]; to be maximized.
        members: Number of members.
    """
    weights = np.full(members, 1 / members)
    best, rate = score(weights), 1.0
    for _ in range(_DESCENT_STEPS if members > 1 else 0):
        gradient = np.array([score(_moved(weights, member, _DIFFERENCE)) - best for member in range(members)])
        gradient /= _DIFFERENCE
        while rate > 1e-4:
            raised = weights * np.exp(np.clip(rate * (gradient - gradient.max()), -50, 0))
            raised /= raised.sum()
            if (found := score(raised)) > best + 1e-9:
                weights, best, rate = raised, found, rate * 2
                break
            rate /= 2
        else:
            break
    return weights


def _moved(weights: NDArray[np.float64], member: int, by: float) -> NDArray[np.float64]:
    moved = weights * (1 - by)
    moved[member] += by
    return moved
