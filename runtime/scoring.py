"""How probable a given text is: token ids in, log-probabilities out, in memory that does not grow with the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.mixing import check_numbers, linear_targets, log_linear, target_log_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.member import Member
    from edgemix.runtime.mixing import Combine


def score_tokens(
    members: Sequence[Member],
    weights: NDArray[np.float64],
    ids: NDArray[np.int64],
    *,
    combine: Combine,
    vocabulary: int,
    window: int,
    advance: Callable[[float], None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities of every token after the first.

    A text longer than `window` is read in windows of that many tokens that share nothing: each begins with an empty
    past, so that its first token is scored, as the last one's continuation, by the window before.

    Args:
        members: All members; each is evaluated, whatever it weighs.
        weights: float64 [members], sum one.
        ids: int64 [tokens], at least two, all within the vocabulary.
        combine: How the members are mixed.
        vocabulary: The tokenizer's; logits beyond it are cut off.
        window: Most tokens that are read with one past; at most the context.
        advance: Told how many tokens have been scored since it was last told.

    Raises:
        EdgemixError: A graph fails, or computes something that is not a number.

    Returns:
        The mixture's, float64 [tokens - 1], and each member's, float64 [members, tokens - 1], in nats.
    """
    mixed = np.empty(len(ids) - 1, np.float64)
    own = np.empty((len(members), len(ids) - 1), np.float64)
    caches = [member.new_cache() for member in members]
    chunk = min(member.chunk for member in members)
    try:
        for start in range(0, len(ids) - 1, window):
            for cache in caches:
                cache.rollback([0])
            end = min(start + window, len(ids) - 1)
            for at in range(start, end, chunk):
                part = slice(at, min(at + chunk, end))
                logits = [
                    member.extend_all(cache, [ids[part]])[0][:, :vocabulary]
                    for member, cache in zip(members, caches, strict=True)
                ]
                targets = ids[part.start + 1 : part.stop + 1]
                own[:, part] = [target_log_probabilities(each, targets) for each in logits]
                check_numbers(own[:, part])
                mixed[part] = (
                    linear_targets(own[:, part], weights)
                    if combine == "linear"
                    else _geometric_targets(logits, weights, targets)
                )
                advance(part.stop - part.start)
    finally:
        for cache in caches:
            cache.free()
    return mixed, own


def _geometric_targets(
    logits: Sequence[NDArray[np.float32]], weights: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The targets' log-probabilities under `log_linear`, a token at a time so as not to copy all logits."""
    heavy = np.flatnonzero(weights).tolist()
    scored = np.empty(len(targets), np.float64)
    for t, target in enumerate(targets):
        scored[t] = log_linear(np.stack([logits[i][t] for i in heavy]), weights[heavy])[target]
    return scored
