"""Generation of one sequence in fewer calls: drafts that the mixture verifies, and members asked only where it matters.

What is generated is what `Decoding` generates: the same tokens where the most probable one is taken; where tokens are
drawn, with the same distribution. A drafted token y, drawn with probability q(y), is taken with probability
min(1, p(y) / q(y)), and else the place's token is drawn from max(0, p - q), normalised; a token that was not drawn has
q(y) = 1 (Leviathan et al. 2023; Chen et al. 2023). p is the mixture's distribution after temperature and filters, as q
is the student's.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.decoding.cost_model import SpeculationCostModel
from edgemix.runtime.decoding.drafters import (
    LONGEST,
    NOTHING,
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
    """Generation of one sequence under way: every `step` gives it one token or more. Compare `engine.Decoding`.

    Args:
        ensemble: What generates.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        seed: None draws from the system's entropy.
        max_new_tokens: Most tokens.
        context: Most tokens that are read.
        eos: Ids that finish the sequence with "stop".
        student: A ensemble of one model that drafts.
        lookup: Draft from the text itself, too.
        ngrams: What usually follows what: drafts where the text itself has none.
        lazy: Ask members only where the answer depends on them.
        follower: Where the text must have a given form.
        prefixes: Texts that were read before, and where this one will be kept.

    Attributes:
        drafted: Tokens that were drafted and came to a decision; `accepted` of them were taken.
        calls: Calls of the members' graphs.
        state: The text and what the members predict.
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
        self._draft = NOTHING
        self._grammar_state = grammar_state
        # Of a mixture that is held to a form, a member's token, drawn by its weight, is not the mixture's.
        self._plain = sampling.plain and grammar_state is None
        allow = (lambda place: grammar_state.allowed(self._draft.tokens[:place])) if grammar_state else None
        self._cost_model = SpeculationCostModel()
        self.state = LazyState(
            ensemble,
            ids,
            self._penalize if penalized else None,
            allow=allow,
            prefixes=prefixes,
            called=self._called,
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
            behind = grammar_state.allowed if grammar_state else None
            self._student = StudentDrafter(
                sequence, sampling, self._generator, self._cost_model, eos=self._eos, allow=behind
            )
        self._word: tuple[int, int, Source] | None = None
        self._begun = self._finished = False
        self.drafted = self.accepted = 0

    @property
    def calls(self) -> int:
        return self.state.asked

    def step(self) -> list[Token]:
        """The next tokens; the first step reads the prompt. Empty when the sequence is finished."""
        if self._finished:
            return []
        state, begun, asked = self.state, time.perf_counter(), self.state.asked
        self._draft = self._find_draft() if self._begun else NOTHING
        state.open(self._draft.tokens)
        if not self._lazy:
            state.evaluate_all()
        tokens = self._decide()
        state.accept(tokens)
        if self._grammar_state:
            self._grammar_state.take(tokens)
        if self._begun and state.asked > asked:
            self._cost_model.record_step(time.perf_counter() - begun, len(tokens))
        self._begun = True
        return self._advance(tokens)

    def finish(self, sequence: int) -> None:  # noqa: ARG002 - there is one
        """Take the sequence out, whatever it may still have had to say."""
        self._finished = True

    def log_probabilities(self, sequence: int) -> NDArray[np.float64]:  # noqa: ARG002 - there is one
        """Of the tokens so far, under the mixture, before temperature and filters: float64 [tokens], nats."""
        return self.state.log_probabilities()

    def attribution(self, sequence: int, first: int = 0) -> TokenAttribution:  # noqa: ARG002 - there is one
        """Return the active members' attribution of the tokens so far, from index `first` on."""
        found = self.state.attribution()
        return TokenAttribution(found.own[:, first:], found.weights[:, first:])

    def close(self) -> None:
        """Free the caches."""
        self._finished = True
        if self._student:
            self._student.close()
        self.state.close()

    @property
    def _most(self) -> int:
        """Most tokens of a draft now: to where the weights change, the budget or the context ends."""
        state = self.state
        return min(LONGEST, state.room, self._budget - 1, self._context - state.length)

    def _find_draft(self, ahead: Sequence[int] = ()) -> Draft:
        """What may come behind the text, and behind tokens that may follow it; only what the text's form allows. From
        the first drafter that costs nothing and has something (what the text says itself is right more often than
        n-grams of other texts), or from the student, where that is likely to save more.
        """
        if (most := self._most - len(ahead)) <= 0:
            return NOTHING
        text = np.append(self.state.text, np.asarray(ahead, np.int64))
        found = NOTHING
        for drafter in self._drafters:
            if (found := self._held(drafter.draft(text, most, len(ahead)), ahead)).tokens:
                break
        if self._student is None or self._student.promise(text, most) <= self._cost_model.saving(found.sources):
            return found
        drawn = self._held(self._student.draft(text, most, len(ahead)), ahead)
        return drawn if drawn.tokens else found

    def _held(self, draft: Draft, ahead: Sequence[int]) -> Draft:
        """The beginning of a draft that the text's form allows. Of drawn tokens that is all: they were drawn so."""
        if self._grammar_state is None or draft.proposals is not None:
            return draft
        valid = max(0, self._grammar_state.valid([*ahead, *draft.tokens]) - len(ahead))
        return Draft(draft.tokens[:valid], draft.sources[:valid])

    def _decide(self) -> list[int]:
        """The window's tokens: the draft's as long as they are taken, then one more."""
        if self._begun and self._lazy and not self._sampling.temperature:
            self._go_on_alone()
        taken: list[int] = []
        for place in range(len(self._draft.tokens) + 1):
            token, as_drafted = self._choose(place)
            taken.append(token)
            if token in self._eos or not as_drafted:
                break
        return taken

    def _go_on_alone(self) -> None:
        """Where others must be asked, let the member of most weight write on first, as a draft: they then read all of
        it at once (collaborative decoding via speculation, arXiv 2502.01662). It is itself drafted for.
        """
        state, cost_model = self.state, self._cost_model
        place, chance, doubtful, self._word = 0, 1.0, False, None
        begun: tuple[int, float] | None = None
        most = self._most
        while True:
            token, certainty = state.argmax_with_margin(place)
            if not state.remaining_weight:
                break
            if certainty < math.inf:
                cost_model.record_uncertainty(certainty <= 1)
            source: Source = ("alone", min(4, int(4 * certainty)) if certainty < 1 else 4)
            doubtful |= certainty <= 1
            chance *= cost_model.acceptance_probability(source) if certainty <= 1 else 1.0
            drafted = self._draft.tokens[place : place + 1]
            if drafted == [token]:
                if certainty <= 1:  # from here on it is this member's word
                    cost_model.record_decision(self._draft.sources[place], accepted=True)
                    self._draft.sources[place] = source
                if token in self._eos:
                    break
            else:
                ends = token in self._eos or place >= most
                if (
                    not doubtful
                    or ends
                    or not cost_model.defer_verification(chance, state.first_evaluated, state.not_evaluated)
                ):
                    self._word = (place, token, source) if certainty <= 1 else None
                    break
                if drafted:
                    cost_model.record_decision(self._draft.sources[place], accepted=False)
                    self.drafted += 1
                    self._shorten(place)
                begun = begun or (place, time.perf_counter())
                self._lengthen(token, source)
            place += 1
        if begun:
            cost_model.record_drafting("alone", time.perf_counter() - begun[1], place - begun[0])

    def _shorten(self, place: int) -> None:
        """Take the draft back from a place on."""
        self.state.shorten(place)
        self._draft = Draft(self._draft.tokens[:place], self._draft.sources[:place])

    def _lengthen(self, token: int, source: Source) -> None:
        """Add a token to the draft, and what may come behind it, for those who were asked to go on with."""
        tokens, sources, _ = self._draft
        ahead = [*tokens, token]
        with self._cost_model.alone(self.state.first_evaluated):
            behind = self._find_draft(ahead)
        self.state.lengthen([token, *behind.tokens])
        self._draft = Draft([*ahead, *behind.tokens], [*sources, source, *behind.sources])

    def _called(self, graph: int, tokens: int, seconds: float, verifies: bool) -> None:
        if self._begun:  # before, it is the prompt that is read, and much is done for the first time
            self._cost_model.record_call(graph, tokens, seconds, verifies=verifies)

    def _choose(self, place: int) -> tuple[int, bool]:
        """The token of a place of the window, and whether it is the draft's."""
        drafted = place < len(self._draft.tokens)
        if (forced := self.state.forced(place)) is not None:
            return forced, drafted and forced == self._draft.tokens[place]
        if not self._sampling.temperature:
            token = self.state.certain_argmax(place)
            if self._word and self._word[0] == place:  # what a member would have gone on with, had it not asked
                self._cost_model.record_decision(self._word[2], token == self._word[1])
            accepted = drafted and token == self._draft.tokens[place]
        elif not drafted:
            return self._draw(place), False
        else:
            token, accepted = self._try(place, self._draft.tokens[place])
        if drafted:
            self.drafted, self.accepted = self.drafted + 1, self.accepted + accepted
            self._cost_model.record_decision(self._draft.sources[place], accepted)
        return token, accepted

    def _draw(self, place: int) -> int:
        """A token of the mixture's distribution; from one member alone, drawn by its weight, where that will do."""
        state = self.state
        if not self._lazy or not self._plain:
            return draw(distribution(state.scores(place), self._sampling), self._generator)
        member = int(self._generator.choice(len(state.weights), p=state.weights / state.weights.sum()))
        state.evaluate_member(member)
        return draw(state.member_probabilities(member, place), self._generator)

    def _try(self, place: int, token: int) -> tuple[int, bool]:
        """Take a drafted token with probability min(1, p / q), or draw from what p has more than q."""
        state, proposals, generator = self.state, self._draft.proposals, self._generator
        bar = generator.random() * (1.0 if proposals is None else float(proposals[place][token]))
        if self._lazy and self._plain:
            while state.remaining_weight:
                if not state.nothing_evaluated:
                    least = float(state.partial_probabilities(place)[token])
                    if bar < least - ROUNDING:
                        return token, True
                    if bar > least + state.remaining_weight + ROUNDING:
                        break
                state.evaluate_next()
        shares = distribution(state.scores(place), self._sampling)
        if bar < shares[token]:
            return token, True
        if proposals is None:
            shares[token] = 0
        else:
            shares = np.maximum(shares - proposals[place], 0)
        if not shares.any():  # p and q are the same but for rounding
            return token, True
        return draw(shares, generator), False

    def _penalize(self, logits: NDArray[np.float32], place: int) -> NDArray[np.float32]:
        seen = self._seen
        if place:
            seen = seen.copy()
            seen[self._draft.tokens[:place]] = True
        return penalize_repetition(logits, np.flatnonzero(seen), self._sampling.repetition_penalty)

    def _advance(self, tokens: list[int]) -> list[Token]:
        self._seen[tokens] = True
        told = []
        for token in tokens:
            self._budget -= 1
            told.append(Token(0, token, finish_reason(token, self._eos, self._budget)))
        self._finished = told[-1].finish_reason is not None
        return told
