"""Log-likelihoods of continuations; common beginnings of texts are read once.

Benchmarks need that: several answers to one question, the same examples before every question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.errors import InputError
from edgemix.runtime.mixing.adaptive import Posterior
from edgemix.runtime.mixing.arithmetic import check_numbers, linear_targets, log_linear, log_softmax
from edgemix.runtime.sequences.prefix_cache import common_length
from edgemix.runtime.sequences.state import SequenceState

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.mixing.ensemble import Ensemble


class Continuation(NamedTuple):
    """A text in two parts, of which the second is scored.

    Attributes:
        context: Token ids, at least one.
        ids: Token ids that follow, at least one.
    """

    context: Sequence[int]
    ids: Sequence[int]


class ContinuationScore(NamedTuple):
    """Log-likelihood of a continuation.

    Attributes:
        log_probabilities: float64 [tokens], of each token under the mixture, in nats.
        greedy: bool [tokens], whether each is the most probable token.
    """

    log_probabilities: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def score_continuations(
    ensemble: Ensemble, continuations: Sequence[Continuation], *, padding: bool = False
) -> Generator[tuple[int, ContinuationScore]]:
    """Score continuations: yield the index of each with its score, in an order that shares beginnings.

    Closing the generator frees the caches. Without `padding`, a score equals that of `Mixture.score` for those tokens.

    Args:
        ensemble: The members and their weights.
        continuations: Each at most as long as the context, not counting its last token, which is never read.
        padding: Whether probabilities are over all of a model's logits, those beyond the tokenizer's vocabulary
            included, as benchmarks of the model itself count them.

    Raises:
        InputError: A part is empty, or a text is too long.
        EdgemixError: A graph fails, or computes something that is not a number.
    """
    context = min(graph.context for graph in ensemble.graphs)
    for index, (before, ids) in enumerate(continuations):
        if not len(before) or not len(ids):
            raise InputError(f"continuation {index + 1} needs at least one token, and one before it")
        if (length := len(before) + len(ids) - 1) > context:
            raise InputError(
                f"continuation {index + 1} makes a text of {length} tokens, more than the context of {context}",
                "Shorten what comes before it.",
            )
    # Big-endian bytes are in the order of the numbers, and take less memory than those do.
    order = sorted(range(len(continuations)), key=lambda i: np.array(_text(continuations[i]), ">u4").tobytes())
    widest = max(graph.vocabulary for graph in ensemble.graphs)
    scorer = _TextScorer(ensemble, widest if padding else ensemble.vocabulary)
    try:
        for index in order:
            one = continuations[index]
            yield index, scorer.score(np.array(_text(one), np.int64), len(one.context))
    finally:
        scorer.close()


def _text(continuation: Continuation) -> list[int]:
    return [*continuation.context, *continuation.ids]


class _TextScorer:
    """Scores one text after another, and reads only what is new in each."""

    def __init__(self, ensemble: Ensemble, vocabulary: int) -> None:
        active = ensemble.active
        self._sequences = [SequenceState(active_graph, vocabulary) for active_graph in ensemble.active_graphs()]
        self._chunk = min(graph.chunk for graph in ensemble.graphs)
        self._combine = ensemble.combine
        self._weights = ensemble.weights[active]
        self._prior = ensemble.prior.narrowed(active) if ensemble.prior else None
        self._parts = np.full((len(active), vocabulary), -np.inf, np.float32)  # a graph may have fewer logits
        self._text = np.empty(0, np.int64)
        self._own = np.empty((len(active), 0))

    def score(self, text: NDArray[np.int64], start: int) -> ContinuationScore:
        """Score the tokens of a text from position `start` on."""
        common = common_length(self._text, text)
        own = np.full((len(self._weights), len(text)), np.nan)
        own[:, :common] = self._own[:, :common]
        # Adaptive weights need the log-probabilities of the whole text; those of the common beginning are known.
        first = start if self._prior is None else min(start, max(common, 1))
        for sequence in self._sequences:
            sequence.truncate(min(common, first - 1))
        posterior = None if self._prior is None else Posterior(self._prior)
        if posterior is not None:
            posterior.observe(own[:, 1:first])
        scored = ContinuationScore(np.empty(len(text) - start), np.empty(len(text) - start, np.bool_))
        for place, members in self._forward(text, first):
            target = text[place]
            for part, logits in zip(self._parts, members, strict=True):
                log_softmax(logits, out=part[: len(logits)])
            own[:, place] = self._parts[:, target]
            check_numbers(own[:, place])
            if place >= start:
                weights = self._weights if posterior is None else posterior.weights
                scored.log_probabilities[place - start], best = self._mix(own[:, place], target, weights)
                scored.greedy[place - start] = best == target
            if posterior is not None:
                posterior.observe(own[:, place, None])
        self._text, self._own = text, own
        return scored

    def close(self) -> None:
        """Free the caches."""
        for sequence in self._sequences:
            sequence.close()

    def _forward(self, text: NDArray[np.int64], first: int) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
        """Yield each position of a text from `first` on, with every member's logits [vocabulary] for it."""
        for begin in range(first, len(text), self._chunk):
            end = min(begin + self._chunk, len(text))
            members: list[NDArray[np.float32]] = []
            for sequence in self._sequences:
                (chunk,) = sequence.forward(text[: end - 1], begin)  # one call is enough
                members += chunk.logits
            for place in range(begin, end):
                yield place, [logits[place - begin] for logits in members]

    def _mix(self, own: NDArray[np.float64], target: np.int64, weights: NDArray[np.float64]) -> tuple[float, np.intp]:
        """Return the mixture's log-probability of a token from the members' `own`, and its most probable token."""
        if self._combine == "linear":
            probabilities = weights.astype(np.float32) @ np.exp(self._parts)
            return float(linear_targets(own[:, None], weights)[0]), probabilities.argmax()
        mixed = log_linear(self._parts, weights)
        return float(mixed[target]), mixed.argmax()
