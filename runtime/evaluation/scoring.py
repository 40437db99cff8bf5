"""Log-probabilities of given texts, in memory that does not grow with the text."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.errors import InputError
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


class TextChunk(NamedTuple):
    """A chunk of a text with the logits of several models.

    Attributes:
        place: Position of its tokens' successors among the scored tokens, which are all but the text's first.
        logits: Each member's: float32 [tokens, vocabulary]; the next chunk overwrites them.
        targets: int64 [tokens], the tokens' successors.
    """

    place: slice
    logits: list[NDArray[np.float32]]
    targets: NDArray[np.int64]


def read(
    models: Sequence[DecoderGraph],
    ids: NDArray[np.int64],
    *,
    vocabulary: int,
    window: int,
    bos: int | None = None,
) -> Generator[TextChunk]:
    """Read a text with several models in chunks of bounded size.

    A text longer than `window` is read in independent windows of that many tokens: each begins with an empty past, and
    its first token is scored by the window before. Models that begin every text with a token of its own get it at the
    beginning of each window.

    Args:
        models: The graphs.
        ids: int64 [tokens], at least two, all within the vocabulary.
        vocabulary: The tokenizer's; logits beyond it are cut off.
        window: Maximum tokens that are read with one past; at least two, at most the context.
        bos: The beginning-of-text token with which the text begins, if the model family has one.

    Raises:
        InputError: The window is out of its bounds.
        EdgemixError: A graph fails.
    """
    context = min(model.context for model in models)
    if not (min(2, context) if bos is None else 2) <= window <= context:
        raise InputError(f"window must be between 2 and the context, {context:,} tokens, not {window:,}")
    caches = [model.new_cache() for model in models]
    chunk = min(model.chunk for model in models)
    try:
        end = 0
        while end < len(ids) - 1:
            for cache in caches:
                cache.rollback([0])
            lead = [] if bos is None or end == 0 else [bos]
            start, end = end, min(end + window - len(lead), len(ids) - 1)
            for at in range(start, end, chunk):
                place = slice(at, min(at + chunk, end))
                tokens = [*(lead if at == start else ()), *ids[place]]
                logits = [
                    member[-len(ids[place]) :, :vocabulary]
                    for model, cache in zip(models, caches, strict=True)
                    for member in model.parts(model.extend_all(cache, [tokens])[0])
                ]
                yield TextChunk(place, logits, ids[place.start + 1 : place.stop + 1])
    finally:
        for cache in caches:
            cache.free()


def score_tokens(
    members: Sequence[DecoderGraph],
    weights: NDArray[np.float64],
    ids: NDArray[np.int64],
    *,
    combine: Combine,
    prior: AdaptivePrior | None = None,
    vocabulary: int,
    window: int,
    bos: int | None = None,
    advance: Callable[[float], None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the log-probabilities of every token after the first.

    Args:
        members: All members' graphs; each is evaluated, whatever its weight.
        weights: float64 [members], sum one.
        ids: As `read`; so are `vocabulary` and `window`.
        combine: How the members are mixed.
        prior: The prior of adaptive weights; None for fixed weights.
        vocabulary: See `read`.
        window: See `read`.
        bos: See `read`.
        advance: Progress callback; takes the number of newly scored tokens.

    Raises:
        EdgemixError: A graph fails, or computes something that is not a number.

    Returns:
        Log-probabilities in nats: of the mixture, float64 [tokens - 1], and of members, float64 [members, tokens - 1].
    """
    mixed = np.empty(len(ids) - 1, np.float64)
    own = np.empty((len(weights), len(ids) - 1), np.float64)
    with closing(read(members, ids, vocabulary=vocabulary, window=window, bos=bos)) as chunks:
        for place, logits, targets in chunks:
            own[:, place] = [target_log_probabilities(each, targets) for each in logits]
            check_numbers(own[:, place])
            mixed[place] = (
                linear_targets(own[:, place], weights)
                if combine == "linear"
                else _geometric_targets(logits, weights, targets)
            )
            advance(len(targets))
    if prior is not None:
        mixed, _ = adaptive_targets(own, prior)
    return mixed, own


def _geometric_targets(
    logits: Sequence[NDArray[np.float32]], weights: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Compute the targets' log-probabilities under `log_linear`, token by token so as not to copy all logits."""
    active = np.flatnonzero(weights).tolist()
    scored = np.empty(len(targets), np.float64)
    for t, target in enumerate(targets):
        scored[t] = log_linear(np.stack([logits[i][t] for i in active]), weights[active])[target]
    return scored
