"""Temperatures that make a member's probabilities as sure as they are right, and the prior of labels.

The negative log-likelihood of softmax(logits / T) is convex in 1 / T, so that there is one best temperature (Guo et al.
2017). One uniform pseudo-example keeps it finite where every example is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

COLDEST, HOTTEST = 0.02, 50.0
"""Bounds of a temperature."""
_STEPS = 60


def fit_temperature(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> float:
    """Return the temperature that makes labels most likely; 1 where there is nothing to learn from.

    Args:
        logits: [examples, labels].
        targets: int64 [examples], the right column of each; negative where the member does not know it, or abstains.
    """
    kept = targets >= 0
    values, right = logits[kept].astype(np.float64), targets[kept]
    if not len(values) or values.shape[-1] < 2:
        return 1.0
    chosen = values[np.arange(len(values)), right]
    middle = values.mean(axis=-1)

    def slope(inverse: float) -> float:
        scores = np.exp(inverse * (values - values.max(axis=-1, keepdims=True)))
        expected = (scores * values).sum(axis=-1) / scores.sum(axis=-1)
        return float((expected - chosen).sum() + (expected - middle).mean())

    return _temperature(slope)


def fit_label_temperature(logits: NDArray[np.floating], targets: NDArray[np.bool_]) -> float:
    """Return the temperature of logits of labels that are independent of each other.

    Args:
        logits: [examples, labels].
        targets: bool [examples, labels], which labels each example has.
    """
    values = logits.astype(np.float64)
    if not values.size:
        return 1.0
    signed = np.where(targets, values, -values)

    def slope(inverse: float) -> float:
        # The derivative of -log sigmoid(b s), and that of its mean over yes and no as the pseudo-example.
        wrong = 0.5 - 0.5 * np.tanh(0.5 * inverse * signed)
        even = np.tanh(0.5 * inverse * np.abs(values)) * np.abs(values) / 2
        return float((-signed * wrong).sum() + even.mean() * values.shape[-1])

    return _temperature(slope)


def _temperature(slope: Callable[[float], float]) -> float:
    """Return 1 / b at the root of an increasing function of b, by bisection of its logarithm; 1 where it is flat."""
    if slope(1 / HOTTEST) == slope(1 / COLDEST) == 0:
        return 1.0
    low, high = -np.log(HOTTEST), -np.log(COLDEST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if slope(float(np.exp(middle))) > 0:
            high = middle
        else:
            low = middle
    return float(np.exp(-(low + high) / 2))


def label_prior(targets: NDArray[np.int64], labels: int) -> NDArray[np.float64]:
    """Return the share of each label among examples, float64 [labels], with one pseudo-example spread over all.

    Args:
        targets: int64 [examples]; negative ones do not count.
        labels: Number of labels.
    """
    counts = np.bincount(targets[targets >= 0], minlength=labels) + 1 / labels
    return np.asarray(counts / counts.sum())


def label_shares(targets: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share of examples that have each label, float64 [labels], from bool [examples, labels]; smoothed."""
    return np.asarray((targets.sum(axis=0) + 0.5) / (len(targets) + 1))
