"""The arithmetic of mixtures, on arrays of log-probabilities (nats).

`linear` is the mixture  P(y) = sum_i w_i P_i(y);  `log-linear` is the normalized weighted geometric mean
P(y) = prod_i P_i(y)^w_i / Z  (a product of experts; Hinton 2002). Both are taken over the tokenizer's vocabulary:
logits beyond it are padding, and are cut off before any softmax.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from edgemix.errors import EdgemixError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

Combine = Literal["linear", "log-linear"]

_LOWEST = np.finfo(np.float32).min


def check_combine(combine: str) -> None:
    """Raise InputError unless `combine` names a way to mix."""
    if combine not in get_args(Combine):
        raise InputError(f"combine={combine!r} is unknown", f"Choose one of: {', '.join(get_args(Combine))}.")


def normalize(weights: Mapping[str, float], members: Sequence[str]) -> NDArray[np.float64]:
    """Return weights as float64 [members] on the simplex; a member that is not named has weight zero.

    Raises:
        InputError: An unknown name, a weight that is negative or not finite, or all weights zero.
    """
    if unknown := [name for name in weights if name not in members]:
        raise InputError(
            f"weights for {', '.join(map(repr, unknown))}: there is no such member",
            f"Members: {', '.join(members)}.",
        )
    if wrong := [name for name, weight in weights.items() if not _is_weight(weight)]:
        listed = ", ".join(f"{name}={weights[name]}" for name in wrong)
        raise InputError(f"weights must be numbers, finite and not negative: {listed}")
    values = np.array([weights.get(name, 0.0) for name in members], np.float64)
    if not values.any():
        raise InputError("all weights are zero", "Give at least one member a weight above zero.")
    values /= values.max()  # so that the sum neither overflows nor loses tiny weights
    return np.asarray(values / values.sum())


def _is_weight(weight: object) -> bool:
    return isinstance(weight, Real) and 0 <= float(weight) < math.inf


def log_softmax(logits: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return log-probabilities over the last axis, in `out` or a new array."""
    shifted: NDArray[np.float32] = np.subtract(logits, logits.max(axis=-1, keepdims=True), out=out)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def most_probable(logits: NDArray[np.float32]) -> tuple[int, float]:
    """Return the token of the highest logit [vocabulary], and its probability."""
    token = int(logits.argmax())
    return token, 1 / float(np.exp(logits - logits[token]).sum())


def linear(log_probabilities: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return log sum_i w_i P_i, from each member's log P_i [members, ..., vocabulary] and weights above zero, sum one.

    Weights are [members], or [members, rows] for log P_i [members, rows, vocabulary].
    """
    if len(log_probabilities) == 1:
        return np.asarray(log_probabilities[0])
    parts = log_probabilities + _column(np.log(weights), log_probabilities)
    # -inf - -inf would be NaN, where a token is impossible for all members.
    peak = np.maximum(parts.max(axis=0), _LOWEST)
    parts -= peak
    np.exp(parts, out=parts)
    total: NDArray[np.float32] = parts.sum(axis=0)
    with np.errstate(divide="ignore"):
        np.log(total, out=total)
    total += peak
    return total


def log_linear(log_probabilities: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the log of the normalized prod_i P_i^w_i.

    Args:
        log_probabilities: log P_i [members, ..., vocabulary]; logits do as well, as their constants cancel.
        weights: Above zero, sum one.
    """
    return log_softmax((log_probabilities * _column(weights, log_probabilities)).sum(axis=0))


def combine_log_probabilities(
    log_probabilities: NDArray[np.float32], weights: NDArray[np.float64], combine: Combine
) -> NDArray[np.float32]:
    """Return the mixture's log-probabilities [..., vocabulary]; see `linear` and `log_linear`."""
    return (linear if combine == "linear" else log_linear)(log_probabilities, weights)


def target_log_probabilities(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return log softmax(logits[t])[targets[t]] for every t: float64 [tokens], from logits [tokens, vocabulary].

    Row by row, so that the work stays within the processor's cache and no second array of that size is made.
    """
    scored = np.empty(len(targets), np.float64)
    for t, (row, target) in enumerate(zip(logits, targets, strict=True)):
        scored[t] = log_softmax(row)[target]
    return scored


def check_numbers(values: NDArray[np.floating] | np.floating) -> None:
    """Raise EdgemixError if a value is NaN, as after an overflow: such a distribution must not be used.

    One log-probability of each distribution suffices: if any is NaN, all are.
    """
    if np.isnan(values).any():
        raise EdgemixError(
            "a member's logits are not numbers: it has overflowed, or its weights are damaged",
            "Export it in fp32 (edgemix verify tells whether the bundle is damaged).",
        )


def _column(weights: NDArray[np.float64], like: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return weights [members, ...] as float32, shaped to broadcast against an array whose first axes are those."""
    return weights.astype(np.float32).reshape(*weights.shape, *[1] * (like.ndim - weights.ndim))


def linear_targets(own: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log sum_i w_i P_i of the targets float64 [tokens], from the members' log P_i float64 [members, tokens]."""
    active = weights > 0
    weighted = own[active] + np.log(weights[active])[:, None]
    result: NDArray[np.float64] = np.logaddexp.reduce(weighted, axis=0)
    return result
