"""Mixture weights that make a text most likely: expectation-maximization on the members' token probabilities.

The likelihood of w is concave, so EM climbs to the best weights from any start inside the simplex:

    r_kn = w_k p_k(y_n) / sum_j w_j p_j(y_n)        (responsibilities)
    w_k  = mean_n r_kn

(Dempster, Laird and Rubin 1977; for mixtures of language models Jelinek and Mercer 1980.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgemix.bundle.manifest import Weights
from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, PrefixedProgress, Progress
from edgemix.runtime.evaluation.evaluate import score_documents
from edgemix.runtime.mixing.arithmetic import normalize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.recipe.labels import LabelRecipe
    from edgemix.recipe.schema import Recipe
    from edgemix.runtime import Mixture


@dataclass(frozen=True)
class Fit:
    """The outcome of a fit.

    Attributes:
        weights: float64 [members], on the simplex.
        log_likelihoods: Mean log-probability of a token, in nats, before each step and after the last; it never falls.
        converged: Whether the last step gained less than the tolerance.
    """

    weights: NDArray[np.float64]
    log_likelihoods: tuple[float, ...]
    converged: bool


def fit(
    log_probabilities: NDArray[np.float64],
    *,
    tolerance: float = 1e-9,
    max_steps: int = 2_000,
) -> Fit:
    """Find the weights that maximize the mean log-likelihood of the mixture.

    Args:
        log_probabilities: float64 [members, tokens], each member's log-probability of each actual token.
        tolerance: Stop when a step gains less than this, in nats a token.
        max_steps: Largest number of steps.

    Raises:
        InputError: No tokens, or a token that is impossible for every member.
    """
    if log_probabilities.size == 0:
        raise InputError("no tokens to fit weights on", "Give validation text of at least two tokens.")
    top = log_probabilities.max(axis=0)
    if not np.isfinite(top).all():
        raise InputError("a validation token has probability zero (or none at all) under every member")
    scaled = np.exp(log_probabilities - top)
    members, tokens = scaled.shape
    weights = np.full(members, 1.0 / members)
    mixed = weights @ scaled
    history = [_mean_log(mixed, top)]
    for _ in range(max_steps):
        weights = weights * (scaled @ (1.0 / mixed)) / tokens
        weights /= weights.sum()
        mixed = weights @ scaled
        history.append(_mean_log(mixed, top))
        if history[-1] - history[-2] < tolerance:
            return Fit(weights, tuple(history), converged=True)
    return Fit(weights, tuple(history), converged=False)


def _mean_log(mixed: NDArray[np.float64], top: NDArray[np.float64]) -> float:
    return float(np.mean(np.log(mixed) + top))


def given_weights(recipe: Recipe | LabelRecipe) -> Weights:
    """Return the weights before any fitting: the recipe's own, normalized, or uniform ones."""
    names = [member.name for member in recipe.members]
    if isinstance(recipe.weights, dict):
        return Weights("given", dict(zip(names, normalize(recipe.weights, names).tolist(), strict=True)))
    return Weights("uniform", dict.fromkeys(names, 1 / len(names)))


def choose_adaptive(weights: Weights, choice: str | dict[str, float]) -> Weights:
    """Set whether fitted weights follow the text by default.

    Args:
        weights: From `fit_weights`.
        choice: A recipe's `weights`: "adaptive", "fixed", or "fit", which is adaptive where several members were fitted
            on several domains: it takes two domains to know that one set of weights does not suit all text.
    """
    several = len(weights.domains) > 1 and len(weights.default) > 1
    return msgspec.structs.replace(weights, adaptive=choice == "adaptive" or (choice == "fit" and several))


def fit_weights(
    mixture: Mixture,
    domains: Mapping[str, Sequence[str]],
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Weights:
    """Fit a mixture's weights on validation text: one set over all domains, where every token counts the same, and the
    best set of each domain alone.

    Args:
        mixture: The loaded mixture; all its members are evaluated, whatever its weights are.
        domains: Domain name -> documents.
        window: Largest number of tokens that are read with one past.
        max_tokens: Largest number of tokens of each domain.

    Raises:
        InputError: A domain has no text to score.
    """
    names = mixture.members
    scores = {
        domain: score_documents(
            mixture,
            domain,
            documents,
            window=window,
            max_tokens=max_tokens,
            progress=PrefixedProgress(progress, domain),
        )
        for domain, documents in domains.items()
    }

    def shares(scored: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(names, fit(scored).weights.tolist(), strict=True))

    return Weights(
        method="fit",
        default=shares(np.concatenate(list(scores.values()), axis=1)),
        domains={domain: shares(scored) for domain, scored in scores.items()},
    )
