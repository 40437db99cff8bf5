"""How probable a given text is: token ids in, log-probabilities out, in memory that does not grow with the text."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.runtime.mixing.adaptive import adaptive_targets
from edgemix.runtime.mixing.arithmetic import (
    check_numbers,
    linear_targets,
    log_linear,
    target_log_probabilities,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.decoder import DecoderGraph
    from edgemix.runtime.mixing.adaptive import AdaptivePrior
    from edgemix.runtime.mixing.arithmetic import Combine


class Piece(NamedTuple):
    """A stretch of a text as several models have read it.

    Attributes:
        place: Where its tokens' successors lie among the scored tokens, which are all but the text's first.
        logits: Each model's, member by member: float32 [tokens, vocabulary]; the next piece overwrites them.
        targets: int64 [tokens], the tokens' successors.
    """

    place: slice
    logits: list[NDArray[np.float32]]
    targets: NDArray[np.int64]


def read(models: Sequence[DecoderGraph], ids: NDArray[np.int64], *, vocabulary: int, window: int) -> Generator[Piece]:
    """Read a text with several models, a bounded piece at a time.

    A text longer than `window` is read in windows of that many tokens that share nothing: each begins with an empty
    past, so that its first token is scored, as the last one's continuation, by the window before.

    Args:
        models: Who reads.
        ids: int64 [tokens], at least two, all within the vocabulary.
        vocabulary: The tokenizer's; logits beyond it are cut off.
        window: Most tokens that are read with one past; at most the context.

    Raises:
        EdgemixError: A graph fails.
    """
    caches = [model.new_cache() for model in models]
    chunk = min(model.chunk for model in models)
    try:
        for start in range(0, len(ids) - 1, window):
            for cache in caches:
                cache.rollback([0])
            end = min(start + window, len(ids) - 1)
            for at in range(start, end, chunk):
                place = slice(at, min(at + chunk, end))
                logits = [
                    member[:, :vocabulary]
                    for model, cache in zip(models, caches, strict=True)
                    for member in model.parts(model.extend_all(cache, [ids[place]])[0])
                ]
                yield Piece(place, logits, ids[place.start + 1 : place.stop + 1])
    finally:
        for cache in caches:
            cache.free()


def score_tokens(
    members: Sequence[DecoderGraph],
    weights: NDArray[np.float64],
    ids: NDArray[np.int64],
    *,
    combine: Combine,
    experts: AdaptivePrior | None = None,
    vocabulary: int,
    window: int,
    advance: Callable[[float], None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities of every token after the first.

    Args:
        members: All members; each is evaluated, whatever it weighs.
        weights: float64 [members], sum one.
        ids: As `read`; so are `vocabulary` and `window`.
        combine: How the members are mixed.
        experts: What the weights follow the text by, through all of it; None for weights that stay.
        vocabulary: See `read`.
        window: See `read`.
        advance: Told how many tokens have been scored since it was last told.

    Raises:
        EdgemixError: A graph fails, or computes something that is not a number.

    Returns:
        The mixture's, float64 [tokens - 1], and each member's, float64 [members, tokens - 1], in nats.
    """
    mixed = np.empty(len(ids) - 1, np.float64)
    own = np.empty((len(weights), len(ids) - 1), np.float64)
    with closing(read(members, ids, vocabulary=vocabulary, window=window)) as pieces:
        for place, logits, targets in pieces:
            own[:, place] = [target_log_probabilities(each, targets) for each in logits]
            check_numbers(own[:, place])
            mixed[place] = (
                linear_targets(own[:, place], weights)
                if combine == "linear"
                else _geometric_targets(logits, weights, targets)
            )
            advance(len(targets))
    if experts is not None:
        mixed, _ = adaptive_targets(own, experts)
    return mixed, own


def _geometric_targets(
    logits: Sequence[NDArray[np.float32]], weights: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The targets' log-probabilities under `log_linear`, a token at a time so as not to copy all logits."""
    active = np.flatnonzero(weights).tolist()
    scored = np.empty(len(targets), np.float64)
    for t, target in enumerate(targets):
        scored[t] = log_linear(np.stack([logits[i][t] for i in active]), weights[active])[target]
    return scored
