"""Continuous batching: sequences join and leave a batch between its steps, each with settings of its own.

What a sequence yields does not depend on the others in the batch. Prompts are read a piece at a time between steps, so
that a long prompt does not hold up the other sequences.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import EdgemixError
from edgemix.runtime.decoding.sampling import choose_token, penalize_repetition
from edgemix.runtime.decoding.tokens import Token, finish_reason
from edgemix.runtime.mixing.adaptive import Posterior, evidence_from
from edgemix.runtime.mixing.arithmetic import check_numbers, combine_log_probabilities, log_softmax
from edgemix.runtime.mixing.attribution import TokenAttribution
from edgemix.runtime.sequences.prefix_cache import PrefixCache
from edgemix.runtime.text.grammar import rule_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.mixing.adaptive import AdaptivePrior
    from edgemix.runtime.mixing.arithmetic import Combine
    from edgemix.runtime.mixing.ensemble import ActiveGraph, Ensemble
    from edgemix.runtime.text.grammar import GrammarState

PREFILL_CHUNK = 128
"""Tokens of a prompt that are read between two steps."""


@dataclass(eq=False)
class GenerationRequest:
    """A sequence to generate.

    Attributes:
        weights: float64 [active members of the batch]; a weight of zero leaves a member out.
        combine: How the members' distributions are mixed.
        prior: What adaptive weights choose among, over the same members; None for fixed weights.
        prompt: int64 [tokens], at least one.
        sampling: How tokens are chosen.
        generator: Source of randomness.
        budget: Most tokens that are still generated.
        eos: Ids that finish the sequence with "stop".
        grammar_state: Where the text must follow a grammar.
        attribution: Keep the members' log-probabilities of each token.
        log_probabilities: Of the tokens so far, under the mixture, nats.
        attributions: One per token so far.
    """

    weights: NDArray[np.float64]
    combine: Combine
    prior: AdaptivePrior | None
    prompt: NDArray[np.int64]
    sampling: Sampling
    generator: np.random.Generator
    budget: int
    eos: frozenset[int]
    grammar_state: GrammarState | None = None
    attribution: bool = False
    log_probabilities: list[float] = field(default_factory=list)
    attributions: list[TokenAttribution] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        ensemble: Ensemble,
        members: NDArray[np.int64],
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        seed: int | None,
        max_new_tokens: int,
        context: int,
        eos: Iterable[int],
        grammar_state: GrammarState | None = None,
        attribution: bool = False,
    ) -> GenerationRequest:
        """Return the request for a prompt.

        Args:
            ensemble: Whose weights mix the members.
            members: int64, the indices among the ensemble's members of those that the batch serves.
            prompt: Token ids, at least one.
            sampling: How tokens are chosen.
            seed: None draws from the system's entropy.
            max_new_tokens: Most tokens.
            context: Most tokens that are read of a sequence; what would follow ends with finish reason "length".
            eos: Ids that finish a sequence with "stop"; the id itself is the last token.
            grammar_state: Where the text must follow a grammar.
            attribution: Keep the members' log-probabilities of each token.
        """
        return cls(
            weights=ensemble.weights[members],
            combine=ensemble.combine,
            prior=ensemble.prior.narrowed(members) if ensemble.prior else None,
            prompt=np.asarray(prompt, np.int64),
            sampling=sampling,
            generator=np.random.default_rng(seed),
            # The last token is never read, so it may lie one beyond the context.
            budget=min(max_new_tokens, context - len(prompt) + 1),
            eos=frozenset(eos),
            grammar_state=grammar_state,
            attribution=attribution,
        )

    def attribution_from(self, first: int = 0) -> TokenAttribution:
        """Return the attribution of the tokens so far, from index `first` on."""
        return TokenAttribution.joined(self.attributions[first:])


class BatchSequence:
    """A sequence of a batch: first its prompt is read, then it has a row of the batch.

    Args:
        request: What to generate.
        active_graphs: The batch's graphs.
        vocabulary: Size of the tokenizer's vocabulary.
        prefixes: Texts that were read before.

    Attributes:
        request: As given.
        states: One per graph, while the prompt is read.
        weights: float64 [members], for the next token.
        log_probabilities: float64 [members, tokens], the members' log-probabilities of the prompt's tokens, nats; NaN
            where they were not computed.
        last: The token that the graphs read next.
    """

    def __init__(
        self,
        request: GenerationRequest,
        active_graphs: Sequence[ActiveGraph],
        vocabulary: int,
        prefixes: PrefixCache,
    ) -> None:
        self.request, self._prompt = request, request.prompt
        self._posterior = Posterior(request.prior) if request.prior else None
        self.weights = request.weights if self._posterior is None else self._posterior.weights
        self._evidence_from = evidence_from(self._prompt) if request.prior else len(self._prompt)
        self.log_probabilities = np.full((len(self.weights), len(self._prompt)), np.nan)
        self.states = []
        for active_graph in active_graphs:
            state, known = prefixes.sequence(active_graph, vocabulary, self._prompt, self._evidence_from)
            self.log_probabilities[list(state.members), : known.shape[1]] = known
            self.states.append(state)
        self._seen = np.unique(self._prompt)
        self.last = -1

    def prefill(self, chunk: int | None = None) -> list[NDArray[np.float32]]:
        """Read the prompt, or its next `chunk` tokens.

        Returns:
            For each member the logits [vocabulary] of the next token; none as long as some of the prompt is unread.

        Raises:
            EdgemixError: A graph fails.
        """
        logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(self.weights)
        end = len(self._prompt)
        if chunk is not None:
            end = min(min(state.read for state in self.states) + chunk, end)
        for state in self.states:
            if state.read >= end:  # more of it was known than to the other graphs
                continue
            for part in state.forward(self._prompt[:end], min(end, max(state.read + 1, self._evidence_from))):
                state.record(part, self._prompt, self.log_probabilities)
                for member, each in zip(state.members, part.logits, strict=True):
                    logits[member] = each[-1]
        if end < len(self._prompt):
            return []
        if self._posterior is not None:
            self._posterior.observe(self.log_probabilities[:, self._evidence_from :])
            self.weights = self._posterior.weights
        return logits

    def mix(self, log_probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mixture's log-probabilities [vocabulary] from the members' [members, vocabulary].

        Raises:
            EdgemixError: They are not numbers.
        """
        active = self.weights > 0
        if active.all():
            mixed = combine_log_probabilities(log_probabilities, self.weights, self.request.combine)
        else:
            mixed = combine_log_probabilities(log_probabilities[active], self.weights[active], self.request.combine)
        check_numbers(mixed[0])
        return mixed

    def choose(self, logits: Sequence[NDArray[np.float32]], log_probabilities: NDArray[np.float32]) -> Token:
        """Choose the next token from the members' logits and log-probabilities [members, vocabulary].

        Raises:
            EdgemixError: They are not numbers.
        """
        request, mixed = self.request, self.mix(log_probabilities)
        penalty = request.sampling.repetition_penalty
        scores = mixed
        if penalty != 1:
            penalized = [log_softmax(penalize_repetition(each, self._seen, penalty)) for each in logits]
            scores = self.mix(np.stack(penalized))
        if request.grammar_state is not None:
            scores = rule_out(scores, request.grammar_state.allowed())
        token = choose_token(scores, request.sampling, request.generator)
        if request.grammar_state is not None:
            request.grammar_state.take([token])
        request.log_probabilities.append(float(mixed[token]))
        self._observe(log_probabilities[:, token].astype(np.float64))
        self.last = token
        if penalty != 1:
            self._seen = np.union1d(self._seen, [token])
        request.budget -= 1
        reason = finish_reason(token, request.eos, request.budget)
        if reason is not None:
            request.budget = 0
        return Token(0, token, reason)

    def close(self) -> None:
        """Free the caches of a prompt that is being read."""
        for state in self.states:
            state.close()

    def _observe(self, log_probabilities: NDArray[np.float64]) -> None:
        """Record the members' log-probabilities of the chosen token, float64 [members], and adapt the weights."""
        if self.request.attribution:
            known = np.where(self.weights > 0, log_probabilities, np.nan)
            self.request.attributions.append(TokenAttribution(known[:, None], self.weights[:, None]))
        if self._posterior is not None:
            self._posterior.observe_token(log_probabilities)
            self.weights = self._posterior.weights


class ContinuousBatch:
    """Generation of sequences that join and leave at any time.

    Args:
        ensemble: Its active members serve all requests, which have weights of their own over them.
        max_sequences: Sequences that are generated at once; others wait.
        prefixes: Texts that were read before, and where prompts are kept.

    Attributes:
        on_join: Called with every sequence before its prompt is read; profilers set it.
    """

    def __init__(self, ensemble: Ensemble, max_sequences: int, prefixes: PrefixCache | None = None) -> None:
        self.on_join: Callable[[BatchSequence], None] | None = None
        self._prefixes = PrefixCache(0) if prefixes is None else prefixes
        self._active_graphs = ensemble.active_graphs()
        self._vocabulary, self._max_sequences = ensemble.vocabulary, max_sequences
        self._members = len(ensemble.active)
        self._caches = [each.graph.new_cache(0) for each in self._active_graphs]
        self._waiting: deque[GenerationRequest] = deque()
        self._reading: BatchSequence | None = None
        self._rows: list[BatchSequence] = []
        # Used at every step: fresh memory costs more than the arithmetic.
        self._log_probabilities = np.empty((self._members, 0, self._vocabulary), np.float32)
        self._cancelled: set[GenerationRequest] = set()

    def __len__(self) -> int:
        """Number of requests that are not finished."""
        return len(self._waiting) + len(self._rows) + (self._reading is not None)

    def add(self, request: GenerationRequest) -> None:
        """Let a sequence join as soon as there is room."""
        self._waiting.append(request)

    def cancel(self, request: GenerationRequest) -> None:
        """Take a sequence out at the next step."""
        self._cancelled.add(request)

    def step(self) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        """Return the next token of every sequence in the batch, and perhaps the first one of a sequence that joins.

        A sequence that failed leaves the batch, and its error is returned in the place of a token.

        Raises:
            EdgemixError: A graph failed on all of them.
        """
        self._drop_cancelled()
        results = self._join(PREFILL_CHUNK)
        self._drop_finished()  # a sequence may end with its first token
        if self._rows:
            results += self._decode()
        self._drop_finished()
        return results

    def prefill(self) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        """Read the prompts of all waiting requests as far as there is room, and return their first tokens."""
        self._drop_cancelled()
        rows = min(len(self._rows) + len(self._waiting), self._max_sequences)
        longest = max((len(request.prompt) for request in self._waiting), default=0)
        for cache in self._caches:
            cache.reserve_rows(rows, longest + 1)
        results = []
        while self._reading is not None or (self._waiting and len(self._rows) < self._max_sequences):
            results += self._join(None)
        return results

    def close(self) -> None:
        """Free the caches."""
        self._drop_reading()
        for cache in self._caches:
            cache.free()
        self._rows = []
        self._waiting.clear()

    def _join(self, chunk: int | None) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        """Read on in the next prompt; when all of it is read, its sequence joins."""
        if self._reading is None and self._waiting and len(self._rows) < self._max_sequences:
            request = self._waiting.popleft()
            try:
                self._reading = BatchSequence(request, self._active_graphs, self._vocabulary, self._prefixes)
            except EdgemixError as error:
                return [(request, error)]
            if self.on_join is not None:
                self.on_join(self._reading)
        row = self._reading
        if row is None:
            return []
        try:
            if not (logits := row.prefill(chunk)):
                return []
            token = row.choose(logits, np.stack([log_softmax(each) for each in logits]))
        except EdgemixError as error:
            self._drop_reading()
            return [(row.request, error)]
        self._reading = None
        for cache, state in zip(self._caches, row.states, strict=True):
            cache.append(state.cache)
            self._prefixes.keep(state, row.request.prompt, row.log_probabilities[list(state.members)])
        row.states = []
        self._rows.append(row)
        return [(row.request, token)]

    def _decode(self) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        new = np.array([[row.last] for row in self._rows])
        if self._log_probabilities.shape[1] != len(new):
            self._log_probabilities = np.empty((self._members, len(new), self._vocabulary), np.float32)
        logits: list[NDArray[np.float32]] = []
        for (graph, local_indices, _), cache in zip(self._active_graphs, self._caches, strict=True):
            members = graph.parts(graph.extend(cache, new))
            logits += [members[index][:, : self._vocabulary] for index in local_indices]
        for each, out in zip(logits, self._log_probabilities, strict=True):
            log_softmax(each, out=out)
        results: list[tuple[GenerationRequest, Token | EdgemixError]] = []
        for index, row in enumerate(self._rows):
            try:
                token = row.choose([each[index] for each in logits], self._log_probabilities[:, index])
            except EdgemixError as error:
                row.request.budget = 0
                results.append((row.request, error))
            else:
                results.append((row.request, token))
        return results

    def _drop_finished(self) -> None:
        """Take finished sequences out; the last row takes the place of each."""
        for index in range(len(self._rows) - 1, -1, -1):
            if self._rows[index].request.budget == 0:
                for cache in self._caches:
                    cache.drop(index)
                self._rows[index] = self._rows[-1]
                self._rows.pop()

    def _drop_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
        self._reading = None

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        gone, self._cancelled = self._cancelled, set()
        self._waiting = deque(request for request in self._waiting if request not in gone)
        if self._reading is not None and self._reading.request in gone:
            self._drop_reading()
        for row in self._rows:
            if row.request in gone:
                row.request.budget = 0
        self._drop_finished()
