"""Drafters: they propose tokens that may come next, of which the mixture verifies several in one call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edgemix.bundle.ngram_table import LONGEST as LONGEST_NGRAM
from edgemix.runtime.decoding.sampling import distribution, draw
from edgemix.runtime.mixing.arithmetic import log_softmax, most_probable
from edgemix.runtime.sequences.prefix_cache import common_length
from edgemix.runtime.text.grammar import rule_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgemix.bundle.ngram_table import NgramTable
    from edgemix.runtime.decoding.cost_model import SpeculationCostModel
    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.sequences.state import SequenceState
    from edgemix.runtime.text.grammar import GrammarState

Source = tuple[str, int]
"""What drafted a token, and how certain it was: the key of its acceptance probability."""
MAX_DRAFT = 15
"""Most tokens of a draft."""
STUDENT_PROMPT_TOKENS = 12
"""Tokens at a prompt's end that the student reads."""
_MAX_LOOKUP = 4
"""Most tokens at the end of a text that are looked up earlier in it."""


class Draft(NamedTuple):
    """Tokens that may follow a text.

    Attributes:
        tokens: Their ids.
        sources: The source of each, see `SpeculationCostModel`.
        proposals: For each the probabilities float32 [vocabulary] that it was sampled with; None where it was not
            sampled.
    """

    tokens: list[int]
    sources: list[Source]
    proposals: list[NDArray[np.float32]] | None = None


NO_DRAFT = Draft([], [])


class Drafter(Protocol):
    """Drafts for one sequence without calling a model."""

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """Propose tokens that may follow a text.

        Args:
            text: int64 [tokens]; apart from the last `ahead` tokens it continues the text of the call before.
            most: Most tokens.
            ahead: Tokens at the end of `text` that are drafted themselves, and not verified yet.
        """
        ...


class PromptLookupDrafter:
    """Proposes what followed the last tokens when they occurred earlier in the text (prompt lookup decoding, Saxena
    2023; LLMA, arXiv 2304.04487).
    """

    def __init__(self, cost_model: SpeculationCostModel) -> None:
        self._cost_model = cost_model
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """See `Drafter`; the tokens are not sampled."""
        self._learn(text[: len(text) - ahead])
        for length in range(min(_MAX_LOOKUP, len(text)), 0, -1):
            start = self._ends.get(tuple(text[-length:].tolist()))
            if start is not None:
                source: Source = ("lookup", length)
                count, _ = self._cost_model.plan_draft(self._cost_model.acceptance_probability(source), most)
                if not count:
                    continue
                tokens = text[start : start + count].tolist()
                while tokens and len(tokens) < count:  # the repetition reaches the end of the text: continue it
                    tokens = (tokens * 2)[:count]
                return Draft(tokens, [source] * len(tokens))
        return NO_DRAFT

    def _learn(self, text: NDArray[np.int64]) -> None:
        """Record where the continuation of each group of tokens begins; the last group has none yet."""
        offset = max(0, self._known - _MAX_LOOKUP)
        ids = text[offset:].tolist()
        for end in range(max(self._known, 1), len(text)):
            for length in range(1, min(_MAX_LOOKUP, end - offset) + 1):
                self._ends[tuple(ids[end - length - offset : end - offset])] = end
        self._known = len(text)


class NgramDrafter:
    """Proposes what most often followed the last tokens in the bundle's training text, up to an end of text.

    Args:
        table: The n-grams.
        cost_model: Decides how many tokens are worth drafting.
        eos: Ids after which nothing is drafted.
    """

    def __init__(
        self, table: NgramTable, cost_model: SpeculationCostModel, *, eos: frozenset[int] = frozenset()
    ) -> None:
        self._table, self._cost_model, self._eos = table, cost_model, eos

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:  # noqa: ARG002 - the table does not change
        """See `Drafter`; the tokens are not sampled."""
        ids = text[-LONGEST_NGRAM:].tolist()
        tokens: list[int] = []
        sources: list[Source] = []
        probability = 1.0
        while len(tokens) < most and (found := self._table.guess(ids)) is not None:
            source: Source = ("n-gram", _quarter(found.share))
            probability *= self._cost_model.acceptance_probability(source)
            if not self._cost_model.worth_drafting(probability):
                break
            tokens.append(found.token)
            sources.append(source)
            ids.append(found.token)
            if found.token in self._eos:
                break
        return Draft(tokens, sources)


class GrammarDrafter:
    """Proposes the only continuation that a grammar allows, in the tokenizer's own spelling."""

    def __init__(self, grammar_state: GrammarState, cost_model: SpeculationCostModel) -> None:
        self._grammar_state, self._cost_model = grammar_state, cost_model

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """See `Drafter`; the tokens are not sampled."""
        source: Source = ("grammar", 1)
        expected = self._grammar_state.expected(text[len(text) - ahead :].tolist())
        count, _ = self._cost_model.plan_draft(
            self._cost_model.acceptance_probability(source), min(most, len(expected))
        )
        return Draft(expected[:count], [source] * count)


class StudentDrafter:
    """Proposes the student's continuation, sampled (or greedy) as the mixture's tokens are.

    The student reads only the end of a prompt: reading all of it would delay the first draft, and better drafts would
    not make up for that. Its head may predict the most frequent tokens only, which takes a fraction of the time
    (FR-Spec, arXiv 2502.14856).

    Args:
        sequence: The student's state.
        sampling: The mixture's sampling.
        generator: Source of randomness.
        cost_model: Decides how many tokens are worth drafting.
        eos: Ids after which nothing is drafted.
        allow: Given drafted tokens, which tokens may follow them, bool [vocabulary]; None allows all.
    """

    def __init__(
        self,
        sequence: SequenceState,
        sampling: Sampling,
        generator: np.random.Generator,
        cost_model: SpeculationCostModel,
        *,
        eos: frozenset[int] = frozenset(),
        allow: Callable[[Sequence[int]], NDArray[np.bool_]] | None = None,
    ) -> None:
        self._sequence, self._sampling, self._generator, self._cost_model = sequence, sampling, generator, cost_model
        self._eos, self._allow = eos, allow
        self._read = np.empty(0, np.int64)
        self._start: int | None = None

    def expected_saving(self, text: NDArray[np.int64], most: int) -> float:
        """Return the seconds that a draft of at most `most` tokens after a text is expected to save."""
        text = text[self._begin(text) :]
        unread = len(text) - 1 - self._known(text)
        return self._cost_model.expected_saving("student", most) - unread * self._cost_model.extra_token_seconds(
            "student"
        )

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """See `Drafter`; this one calls the student."""
        cost_model, sequence = self._cost_model, self._sequence
        before = text[len(text) - ahead :].tolist()
        self._start = self._begin(text)
        text = text[self._start :]
        most = min(most, sequence.context - len(text) + 1)
        sequence.truncate(self._known(text))
        ids = text
        tokens: list[int] = []
        sources: list[Source] = []
        proposals: list[NDArray[np.float32]] = []
        probability, calls = 1.0, 0
        while len(tokens) < most and cost_model.worth_drafting(
            probability * cost_model.acceptance_probability("student"), cost_model.drafting_seconds("student")
        ):
            started, unread = time.perf_counter(), len(ids) - sequence.read
            allowed = self._allowed([*before, *tokens])
            if allowed is not None and not allowed.any():
                break
            ((_, ((logits,),)),) = sequence.forward(ids, len(ids))
            calls += 1
            if allowed is not None:
                logits = rule_out(logits, allowed)
            if self._sampling.temperature:
                probabilities = distribution(log_softmax(logits), self._sampling)
                index, certainty = draw(probabilities, self._generator), float(probabilities.max())
                proposals.append(self._over_vocabulary(probabilities))
            else:
                index, certainty = most_probable(logits)
            token = index if sequence.tokens is None else int(sequence.tokens[index])
            source: Source = ("student", _quarter(certainty))
            probability *= cost_model.acceptance_probability(source)
            if len(self._read):  # the prompt is read only once
                cost_model.record_call("student", unread, time.perf_counter() - started, verifies=False)
            # The length depends on the student's certainty, not on the sampled token: else samples would be biased.
            if not cost_model.worth_drafting(probability):
                break
            tokens.append(token)
            sources.append(source)
            ids = np.append(ids, token)
            if token in self._eos:
                break
        self._read = ids
        if calls:
            cost_model.record_request("student", calls, len(tokens))
        return Draft(tokens, sources, proposals[: len(tokens)] if self._sampling.temperature else None)

    def close(self) -> None:
        """Free the cache."""
        self._sequence.close()

    def _begin(self, text: NDArray[np.int64]) -> int:
        """Return where in a text the student begins to read."""
        return max(0, len(text) - STUDENT_PROMPT_TOKENS) if self._start is None else self._start

    def _known(self, text: NDArray[np.int64]) -> int:
        """Return how many tokens of its part of a text the student has read; the last one is always read again."""
        return min(len(text) - 1, self._sequence.read, common_length(self._read, text))

    def _allowed(self, ahead: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return which of the student's tokens may follow drafted ones; None for all."""
        if self._allow is None:
            return None
        allowed, tokens = self._allow(ahead), self._sequence.tokens
        return allowed if tokens is None else allowed[tokens]

    def _over_vocabulary(self, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return probabilities of the student's tokens as those of all tokens: float32 [vocabulary]."""
        if self._sequence.tokens is None:
            return probabilities
        full = np.zeros(self._sequence.vocabulary, np.float32)
        full[self._sequence.tokens] = probabilities
        return full


def _quarter(probability: float) -> int:
    """Return the index of the quarter of 0 to 1 that a probability lies in."""
    return min(3, int(4 * probability))
