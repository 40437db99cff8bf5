"""Where drafts come from: tokens that the mixture may be about to say, for it to verify several at once."""

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
"""Who drafted a token, and how sure of it they were."""
LONGEST = 15
"""Most tokens of a draft."""
_MEMORY = 12
"""Tokens of a prompt that the student reads."""
_GRAM = 4
"""Most tokens at the end of a text that are looked for before."""


class Draft(NamedTuple):
    """Tokens that may follow a text.

    Attributes:
        tokens: Their ids.
        sources: For each, what its chance is counted by.
        proposals: For each the probabilities float32 [vocabulary] that it was drawn with; None where it was not drawn.
    """

    tokens: list[int]
    sources: list[Source]
    proposals: list[NDArray[np.float32]] | None = None


NOTHING = Draft([], [])


class Drafter(Protocol):
    """Drafts for one sequence, which cost no call of a model."""

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """What may follow a text: at most so many tokens. Its last `ahead` are not certain yet; without them it is the
        text of the last call, or that and more.
        """
        ...


class PromptLookupDrafter:
    """What followed the last tokens when they came before, in the prompt or in what was written (prompt lookup
    decoding, Saxena 2023; LLMA, arXiv 2304.04487).
    """

    def __init__(self, cost_model: SpeculationCostModel) -> None:
        self._cost_model = cost_model
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """See `Drafter`; its tokens are not drawn."""
        self._learn(text[: len(text) - ahead])
        for length in range(min(_GRAM, len(text)), 0, -1):
            start = self._ends.get(tuple(text[-length:].tolist()))
            if start is not None:
                source: Source = ("lookup", length)
                count, _ = self._cost_model.plan(self._cost_model.acceptance_probability(source), most)
                if not count:
                    continue
                tokens = text[start : start + count].tolist()
                while tokens and len(tokens) < count:  # what it repeats reaches up to the end: on it goes
                    tokens = (tokens * 2)[:count]
                return Draft(tokens, [source] * len(tokens))
        return NOTHING

    def _learn(self, text: NDArray[np.int64]) -> None:
        """Note where what follows each group of tokens begins; the last group has nothing behind it yet."""
        offset = max(0, self._known - _GRAM)
        ids = text[offset:].tolist()
        for end in range(max(self._known, 1), len(text)):
            for length in range(1, min(_GRAM, end - offset) + 1):
                self._ends[tuple(ids[end - length - offset : end - offset])] = end
        self._known = len(text)


class NgramDrafter:
    """What most often followed the last tokens in the bundle's training text, up to an end of text.

    Args:
        table: What follows what.
        pace: Tells what pays.
        eos: Ids that nothing is drafted behind.
    """

    def __init__(
        self, table: NgramTable, cost_model: SpeculationCostModel, *, eos: frozenset[int] = frozenset()
    ) -> None:
        self._table, self._cost_model, self._eos = table, cost_model, eos

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:  # noqa: ARG002 - it learns nothing
        """See `Drafter`; its tokens are not drawn."""
        ids = text[-LONGEST_NGRAM:].tolist()
        tokens: list[int] = []
        sources: list[Source] = []
        chance = 1.0
        while len(tokens) < most and (found := self._table.guess(ids)) is not None:
            source: Source = ("n-gram", _quarter(found.share))
            chance *= self._cost_model.acceptance_probability(source)
            if not self._cost_model.worth_drafting(chance):
                break
            tokens.append(found.token)
            sources.append(source)
            ids.append(found.token)
            if found.token in self._eos:
                break
        return Draft(tokens, sources)


class GrammarDrafter:
    """What a text of a given form can only go on with, as its tokenizer spells it."""

    def __init__(self, grammar_state: GrammarState, cost_model: SpeculationCostModel) -> None:
        self._grammar_state, self._cost_model = grammar_state, cost_model

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """See `Drafter`; its tokens are not drawn."""
        source: Source = ("form", 1)
        expected = self._grammar_state.expected(text[len(text) - ahead :].tolist())
        count, _ = self._cost_model.plan(self._cost_model.acceptance_probability(source), min(most, len(expected)))
        return Draft(expected[:count], [source] * count)


class StudentDrafter:
    """The student's own continuation, drawn (or not) as the mixture's tokens are. Of a text that is there already it
    reads the end only: drafts need not be the best, and the beginning would delay them. Nor need they be of all tokens:
    a head of the most frequent ones takes a fraction of the time (FR-Spec, arXiv 2502.14856).

    Args:
        reader: The student's.
        sampling: The mixture's.
        generator: Where randomness comes from.
        pace: Tells what pays.
        eos: Ids that nothing is drafted behind.
        allow: Which tokens may come behind some that are drafted, bool [vocabulary]; None allows all.
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

    def promise(self, text: NDArray[np.int64], most: int) -> float:
        """Seconds that a draft of at most so many tokens behind a text is likely to save."""
        own = text[self._begin(text) :]
        behind = len(own) - 1 - self._known(own)
        return self._cost_model.expected_saving("student", most) - behind * self._cost_model.reading("student")

    def draft(self, text: NDArray[np.int64], most: int, ahead: int = 0) -> Draft:
        """See `Drafter`, but for calls of the student."""
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
        chance, calls = 1.0, 0
        while len(tokens) < most and cost_model.worth_drafting(
            chance * cost_model.acceptance_probability("student"), cost_model.drafting("student")
        ):
            started, behind = time.perf_counter(), len(ids) - sequence.read
            allowed = self._allowed([*before, *tokens])
            if allowed is not None and not allowed.any():
                break
            ((_, ((logits,),)),) = sequence.forward(ids, len(ids))
            calls += 1
            if allowed is not None:
                logits = rule_out(logits, allowed)
            if self._sampling.temperature:
                shares = distribution(log_softmax(logits), self._sampling)
                place, surest = draw(shares, self._generator), float(shares.max())
                proposals.append(self._of_all(shares))
            else:
                place, surest = most_probable(logits)
            token = place if sequence.tokens is None else int(sequence.tokens[place])
            source: Source = ("student", _quarter(surest))
            chance *= cost_model.acceptance_probability(source)
            if len(self._read):  # a text's beginning comes once
                cost_model.record_call("student", behind, time.perf_counter() - started, verifies=False)
            # Decided by how sure the student is, not by what was drawn: else draws would no longer be fair.
            if not cost_model.worth_drafting(chance):
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
        """Where in a text it begins to read."""
        return max(0, len(text) - _MEMORY) if self._start is None else self._start

    def _known(self, text: NDArray[np.int64]) -> int:
        """How many tokens of its part of a text it has read, the last one left out: what follows is asked again."""
        return min(len(text) - 1, self._sequence.read, common_length(self._read, text))

    def _allowed(self, ahead: Sequence[int]) -> NDArray[np.bool_] | None:
        """Which of the student's own tokens may come behind some that are drafted; None for all."""
        if self._allow is None:
            return None
        allowed, own = self._allow(ahead), self._sequence.tokens
        return allowed if own is None else allowed[own]

    def _of_all(self, shares: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of the student's own tokens as those of all: float32 [vocabulary]."""
        if self._sequence.tokens is None:
            return shares
        whole = np.zeros(self._sequence.vocabulary, np.float32)
        whole[self._sequence.tokens] = shares
        return whole


def _quarter(probability: float) -> int:
    """Which quarter of 0 to 1 a probability lies in."""
    return min(3, int(4 * probability))
