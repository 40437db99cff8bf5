"""Agreement of single models (members, student) with the mixture.

Two measures at every token of a text. Greedy agreement: the model's most probable next token is the mixture's. And
the acceptance rate that a model would have as the mixture's draft model at temperature 1,

    sum_y min(P_model(y), P_mixture(y)) = 1 - TV(P_model, P_mixture)

(Leviathan, Kalman and Matias 2022, arXiv 2211.17192, theorem 3.5).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.evaluation.scoring import read
from edgemix.runtime.mixing.arithmetic import check_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.mixing.ensemble import Ensemble


@dataclass(frozen=True, slots=True)
class Comparison:
    """Log-probabilities of a text under several models, and their agreement with the mixture.

    Attributes:
        log_probabilities: float64 [models, tokens], of the tokens but a text's first, in nats.
        agreements: bool [models, tokens], whether the model's most probable token is the mixture's.
        acceptances: float64 [models, tokens], sum_y min(P_model(y), P_mixture(y)).
        bytes: UTF-8 bytes of the tokens.
        lengths: The texts' lengths in tokens, without their first ones.
    """

    log_probabilities: NDArray[np.float64]
    agreements: NDArray[np.bool_]
    acceptances: NDArray[np.float64]
    bytes: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Comparison]) -> Comparison:
        """Concatenate several texts."""
        return cls(
            np.concatenate([part.log_probabilities for part in parts], axis=1),
            np.concatenate([part.agreements for part in parts], axis=1),
            np.concatenate([part.acceptances for part in parts], axis=1),
            sum(part.bytes for part in parts),
            tuple(length for part in parts for length in part.lengths),
        )


def compare_tokens(
    ensemble: Ensemble,
    ids: NDArray[np.int64],
    *,
    scored_bytes: int,
    window: int,
    bos: int | None = None,
    advance: Callable[[float], None],
) -> Comparison:
    """Read a text with several models and compare each with their mixture.

    Args:
        ensemble: The models with their weights; a student has weight zero.
        ids: int64 [tokens], at least two, all within the vocabulary.
        scored_bytes: UTF-8 bytes of all tokens but the first.
        window: Maximum tokens that are read with one past, see `scoring.read`.
        bos: See `scoring.read`.
        advance: Progress callback; takes the number of newly read tokens.

    Raises:
        EdgemixError: A graph fails, or computes something that is not a number.
    """
    shape = len(ensemble.weights), len(ids) - 1
    found = Comparison(np.empty(shape), np.empty(shape, np.bool_), np.empty(shape), scored_bytes, shape[1:])
    row = np.empty((len(ensemble.weights), ensemble.vocabulary), np.float32)
    shares = ensemble.weights.astype(np.float32)
    with closing(read(ensemble.graphs, ids, vocabulary=ensemble.vocabulary, window=window, bos=bos)) as chunks:
        for place, logits, targets in chunks:
            # A token at a time: its distributions stay within the processor's cache.
            for t, target in enumerate(targets):
                for model, each in enumerate(logits):
                    row[model] = each[t]
                at = place.start + t
                found.log_probabilities[:, at] = _to_probabilities(row, target)
                mixed = shares @ row
                found.agreements[:, at] = row.argmax(axis=1) == mixed.argmax()
                found.acceptances[:, at] = np.minimum(row, mixed).sum(axis=1)
            check_numbers(found.log_probabilities[:, place])
            advance(len(targets))
    return found


def _to_probabilities(logits: NDArray[np.float32], target: np.int64) -> NDArray[np.float64]:
    """Turn logits [models, vocabulary] into probabilities in place; return the target's logarithm, float64 [models]."""
    logits -= logits.max(axis=1, keepdims=True)
    of_target = logits[:, target].astype(np.float64)
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    logits /= total
    return np.asarray(of_target - np.log(total[:, 0]))
