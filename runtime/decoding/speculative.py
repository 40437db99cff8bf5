"""Speculative decoding of one sequence: the mixture verifies drafts, and members are evaluated lazily.

The result is that of `StaticBatch`: the same tokens where decoding is greedy; where tokens are sampled, the same
distribution. A drafted token y, sampled with probability q(y), is accepted with probability min(1, p(y) / q(y)), and
else the position's token is sampled from max(0, p - q), normalized; a token that was not sampled has q(y) = 1
(Leviathan et al. 2023; Chen et al. 2023). p is the mixture's distribution after temperature and filters, as q is the
student's.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.decoding.cost_model import SpeculationCostModel
from edgemix.runtime.decoding.drafters import (
    MAX_DRAFT,
    NO_DRAFT,
    Draft,
    GrammarDrafter,
    NgramDrafter,
    PromptLookupDrafter,
    Source,
    StudentDrafter,
)
from edgemix.runtime.decoding.lazy import ROUNDING, LazyState
from edgemix.runtime.decoding.sampling import distribution, draw, penalize_repetition
from edgemix.runtime.decoding.tokens import Token, finish_reason
from edgemix.runtime.mixing.attribution import TokenAttribution
from edgemix.runtime.sequences.state import SequenceState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from edgemix.bundle.ngram_table import NgramTable
    from edgemix.runtime.decoding.drafters import Drafter
    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.sequences.prefix_cache import PrefixCache
    from edgemix.runtime.text.grammar import GrammarState


class SpeculativeDecoding:
    """Generation of one sequence under way: every `step` gives it one token or more. Compare `StaticBatch`.

    Args:
        ensemble: What generates.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        seed: None draws from the system's entropy.
        max_new_tokens: Most tokens.
        context: Most tokens that are read.
        eos: Ids that finish the sequence with "stop".
        student: An ensemble of one model that drafts.
        lookup: Whether to draft from the text itself.
        ngrams: N-grams of the training text, to draft from where the text itself has nothing.
        lazy: Whether to evaluate members only where the result depends on them.
        grammar_state: Where the text must follow a grammar.
        prefixes: Texts that were read before, and where this one will be kept.

    Attributes:
        drafted: Drafted tokens that were decided on; `accepted` of them were accepted.
        calls: Calls of the members' graphs.
        state: The text and the members' predictions.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        seed: int | None,
        max_new_tokens: int,
        context: int,
        eos: Iterable[int],
        student: Ensemble | None = None,
        lookup: bool = True,
        ngrams: NgramTable | None = None,
        lazy: bool = True,
        grammar_state: GrammarState | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        ids = np.asarray(prompt, np.int64)
        self._sampling, self._eos, self._context = sampling, frozenset(eos), context
        self._lazy = lazy and ensemble.combine == "linear"
        self._generator = np.random.default_rng(seed)
        # The last token is never read, so it may lie one beyond the context.
        self._budget = min(max_new_tokens, context - len(ids) + 1)
        penalized = sampling.repetition_penalty != 1
        self._draft = NO_DRAFT
        self._grammar_state = grammar_state
        # Under a grammar, a token of one member, sampled by its weight, is not a sample of the mixture.
        self._plain = sampling.plain and grammar_state is None
        allow = (lambda position: grammar_state.allowed(self._draft.tokens[:position])) if grammar_state else None
        self._cost_model = SpeculationCostModel()
        self.state = LazyState(
            ensemble,
            ids,
            self._penalize if penalized else None,
            allow=allow,
            prefixes=prefixes,
            on_call=self._record_call,
        )
        self._seen = np.zeros(ensemble.vocabulary, bool)
        self._seen[ids] = True
        self._drafters: list[Drafter] = []
        if grammar_state is not None and (lookup or student is not None):
            self._drafters.append(GrammarDrafter(grammar_state, self._cost_model))
        if lookup:
            self._drafters.append(PromptLookupDrafter(self._cost_model))
        if ngrams is not None:
            self._drafters.append(NgramDrafter(ngrams, self._cost_model, eos=self._eos))
        self._student: StudentDrafter | None = None
        if student is not None:
            (active_graph,) = student.active_graphs()
            sequence = SequenceState(active_graph, ensemble.vocabulary)
            after = grammar_state.allowed if grammar_state else None
            self._student = StudentDrafter(
                sequence, sampling, self._generator, self._cost_model, eos=self._eos, allow=after
            )
        self._deferred: tuple[int, int, Source] | None = None
        self._begun = self._finished = False
        self.drafted = self.accepted = 0

    @property
    def calls(self) -> int:
        return self.state.calls

    def step(self) -> list[Token]:
        """Return the next tokens; the first step reads the prompt. Empty when the sequence is finished."""
        if self._finished:
            return []
        state, started, calls = self.state, time.perf_counter(), self.state.calls
        self._draft = self._find_draft() if self._begun else NO_DRAFT
        state.begin_draft(self._draft.tokens)
        if not self._lazy:
            state.evaluate_all()
        tokens = self._decide()
        state.accept(tokens)
        if self._grammar_state:
            self._grammar_state.take(tokens)
        if self._begun and state.calls > calls:
            self._cost_model.record_step(time.perf_counter() - started, len(tokens))
        self._begun = True
        return self._advance(tokens)

    def finish(self, sequence: int) -> None:  # noqa: ARG002 - there is one
        """Finish the sequence."""
        self._finished = True

    def log_probabilities(self, sequence: int) -> NDArray[np.float64]:  # noqa: ARG002 - there is one
        """Return float64 [tokens], nats: of the tokens so far, under the mixture, before temperature and filters."""
        return self.state.log_probabilities()

    def attribution(self, sequence: int, first: int = 0) -> TokenAttribution:  # noqa: ARG002 - there is one
        """Return the active members' attribution of the tokens so far, from index `first` on."""
        found = self.state.attribution()
        return TokenAttribution(found.log_probabilities[:, first:], found.weights[:, first:])

    def close(self) -> None:
        """Free the caches."""
        self._finished = True
        if self._student:
            self._student.close()
        self.state.close()

    @property
    def _max_draft(self) -> int:
        """Most tokens of a draft now: up to a change of the weights, the token budget, or the end of the context."""
        state = self.state
        return min(MAX_DRAFT, state.room, self._budget - 1, self._context - state.length)

    def _find_draft(self, ahead: Sequence[int] = ()) -> Draft:
        """Return a draft of what may follow the text and the tokens `ahead` of it, as far as the grammar allows it.

        It comes from the first drafter that costs nothing and has a draft (the text itself is right more often than
        n-grams of other texts), or from the student, where that is expected to save more.
        """
        if (most := self._max_draft - len(ahead)) <= 0:
            return NO_DRAFT
        text = np.append(self.state.text, np.asarray(ahead, np.int64))
        found = NO_DRAFT
        for drafter in self._drafters:
            if (found := self._restrict(drafter.draft(text, most, len(ahead)), ahead)).tokens:
                break
        if self._student is None or self._student.expected_saving(text, most) <= self._cost_model.saving(found.sources):
            return found
        drawn = self._restrict(self._student.draft(text, most, len(ahead)), ahead)
        return drawn if drawn.tokens else found

    def _restrict(self, draft: Draft, ahead: Sequence[int]) -> Draft:
        """Return the beginning of a draft that the grammar allows; sampled drafts follow the grammar already."""
        if self._grammar_state is None or draft.proposals is not None:
            return draft
        valid = max(0, self._grammar_state.valid([*ahead, *draft.tokens]) - len(ahead))
        return Draft(draft.tokens[:valid], draft.sources[:valid])

    def _decide(self) -> list[int]:
        """Return the tokens of this step: those of the draft that are accepted, then one more."""
        if self._begun and self._lazy and not self._sampling.temperature:
            self._decode_alone()
        taken: list[int] = []
        for position in range(len(self._draft.tokens) + 1):
            token, as_drafted = self._choose(position)
            taken.append(token)
            if token in self._eos or not as_drafted:
                break
        return taken

    def _decode_alone(self) -> None:
        """Where other members must be evaluated, let the one of most weight decode first, as a draft: the others
        then read all of it at once (collaborative decoding via speculation, arXiv 2502.01662). Its tokens may be
        drafted, too.
        """
        state, cost_model = self.state, self._cost_model
        position, probability, uncertain, self._deferred = 0, 1.0, False, None
        started: tuple[int, float] | None = None
        most = self._max_draft
        while True:
            token, margin = state.argmax_with_margin(position)
            if not state.remaining_weight:
                break
            if margin < math.inf:
                cost_model.record_uncertainty(margin <= 1)
            source: Source = ("alone", min(4, int(4 * margin)) if margin < 1 else 4)
            uncertain |= margin <= 1
            probability *= cost_model.acceptance_probability(source) if margin <= 1 else 1.0
            drafted = self._draft.tokens[position : position + 1]
            if drafted == [token]:
                if margin <= 1:  # from here on the token is this member's
                    cost_model.record_decision(self._draft.sources[position], accepted=True)
                    self._draft.sources[position] = source
                if token in self._eos:
                    break
            else:
                ends = token in self._eos or position >= most
                if (
                    not uncertain
                    or ends
                    or not cost_model.defer_verification(probability, state.first_evaluated, state.not_evaluated)
                ):
                    self._deferred = (position, token, source) if margin <= 1 else None
                    break
                if drafted:
                    cost_model.record_decision(self._draft.sources[position], accepted=False)
                    self.drafted += 1
                    self._truncate_draft(position)
                started = started or (position, time.perf_counter())
                self._extend_draft(token, source)
            position += 1
        if started:
            cost_model.record_drafting("alone", time.perf_counter() - started[1], position - started[0])

    def _truncate_draft(self, position: int) -> None:
        """Drop the draft from a position on."""
        self.state.truncate_draft(position)
        self._draft = Draft(self._draft.tokens[:position], self._draft.sources[:position])

    def _extend_draft(self, token: int, source: Source) -> None:
        """Add a token to the draft, and what may follow it, for the members evaluated so far to continue with."""
        tokens, sources, _ = self._draft
        ahead = [*tokens, token]
        with self._cost_model.single_graph(self.state.first_evaluated):
            after = self._find_draft(ahead)
        self.state.extend_draft([token, *after.tokens])
        self._draft = Draft([*ahead, *after.tokens], [*sources, source, *after.sources])

    def _record_call(self, graph: int, tokens: int, seconds: float, verifies: bool) -> None:
        if self._begun:  # before, the prompt is read, and much is done for the first time
            self._cost_model.record_call(graph, tokens, seconds, verifies=verifies)

    def _choose(self, position: int) -> tuple[int, bool]:
        """Return the token at a position of the draft, and whether it is the drafted one."""
        drafted = position < len(self._draft.tokens)
        if (forced := self.state.only_allowed(position)) is not None:
            return forced, drafted and forced == self._draft.tokens[position]
        if not self._sampling.temperature:
            token = self.state.certain_argmax(position)
            if self._deferred and self._deferred[0] == position:  # what a member would have continued with
                self._cost_model.record_decision(self._deferred[2], token == self._deferred[1])
            accepted = drafted and token == self._draft.tokens[position]
        elif not drafted:
            return self._draw(position), False
        else:
            token, accepted = self._verify(position, self._draft.tokens[position])
        if drafted:
            self.drafted, self.accepted = self.drafted + 1, self.accepted + accepted
            self._cost_model.record_decision(self._draft.sources[position], accepted)
        return token, accepted

    def _draw(self, position: int) -> int:
        """Sample a token of the mixture; from one member alone, sampled by its weight, where that is equivalent."""
        state = self.state
        if not self._lazy or not self._plain:
            return draw(distribution(state.scores(position), self._sampling), self._generator)
        member = int(self._generator.choice(len(state.weights), p=state.weights / state.weights.sum()))
        state.evaluate_member(member)
        return draw(state.member_probabilities(member, position), self._generator)

    def _verify(self, position: int, token: int) -> tuple[int, bool]:
        """Accept a drafted token with probability min(1, p / q), or sample from what p has more than q."""
        state, proposals, generator = self.state, self._draft.proposals, self._generator
        threshold = generator.random() * (1.0 if proposals is None else float(proposals[position][token]))
        if self._lazy and self._plain:
            while state.remaining_weight:
                if not state.nothing_evaluated:
                    lower_bound = float(state.partial_probabilities(position)[token])
                    if threshold < lower_bound - ROUNDING:
                        return token, True
                    if threshold > lower_bound + state.remaining_weight + ROUNDING:
                        break
                state.evaluate_next()
        probabilities = distribution(state.scores(position), self._sampling)
        if threshold < probabilities[token]:
            return token, True
        if proposals is None:
            probabilities[token] = 0
        else:
            probabilities = np.maximum(probabilities - proposals[position], 0)
        if not probabilities.any():  # p and q are the same but for rounding
            return token, True
        return draw(probabilities, generator), False

    def _penalize(self, logits: NDArray[np.float32], position: int) -> NDArray[np.float32]:
        seen = self._seen
        if position:
            seen = seen.copy()
            seen[self._draft.tokens[:position]] = True
        return penalize_repetition(logits, np.flatnonzero(seen), self._sampling.repetition_penalty)

    def _advance(self, tokens: list[int]) -> list[Token]:
        self._seen[tokens] = True
        tokens_out = []
        for token in tokens:
            self._budget -= 1
            tokens_out.append(Token(0, token, finish_reason(token, self._eos, self._budget)))
        self._finished = tokens_out[-1].finish_reason is not None
        return tokens_out
