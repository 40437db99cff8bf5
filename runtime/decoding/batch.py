"""Continuous batching: sequences join and leave a batch between its steps, each with settings of its own.

What a sequence yields does not depend on who else is there. Prompts are read a piece at a time between steps, so that a
long one holds nobody up for long.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import EdgemixError
from edgemix.runtime.decoding.plain import Token, finish_reason
from edgemix.runtime.decoding.sampling import choose_token, penalize_repetition
from edgemix.runtime.mixing.adaptive import Posterior, evidence_from
from edgemix.runtime.mixing.arithmetic import check_numbers, combine_log_probabilities, log_softmax
from edgemix.runtime.mixing.attribution import TokenAttribution
from edgemix.runtime.sequences.prefix_cache import PrefixCache
from edgemix.runtime.text.grammar import rule_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.mixing.ensemble import ActiveGraph, Ensemble
    from edgemix.runtime.text.grammar import GrammarState

PIECE = 128
"""Tokens of a prompt that are read between two steps."""


@dataclass(eq=False)
class GenerationRequest:
    """A sequence to generate.

    Attributes:
        ensemble: Of all the batch's members; weights of zero leave one out.
        prompt: int64 [tokens], at least one.
        sampling: How tokens are chosen.
        generator: Where randomness comes from.
        budget: Most tokens.
        eos: Ids that finish it with "stop".
        follower: Where it must have a given form.
        log_probabilities: Of its tokens so far, under the mixture, nats.
        attribution: Remember what members said, for `spoken`.
        said: What members gave each of them, and weighed.
    """

    ensemble: Ensemble
    prompt: NDArray[np.int64]
    sampling: Sampling
    generator: np.random.Generator
    budget: int
    eos: frozenset[int]
    grammar_state: GrammarState | None = None
    attribution: bool = False
    log_probabilities: list[float] = field(default_factory=list)
    said: list[TokenAttribution] = field(default_factory=list)

    def spoken(self, first: int = 0) -> TokenAttribution:
        """What members gave its tokens so far, from one of them on."""
        return TokenAttribution.joined(self.said[first:])


class _Row:
    """A request that is being served."""

    def __init__(
        self, request: GenerationRequest, active_graph: Sequence[ActiveGraph], vocabulary: int, prefixes: PrefixCache
    ) -> None:
        self.request, self.prompt = request, request.prompt
        experts = request.ensemble.prior
        self._posterior = Posterior(experts) if experts else None
        self.weights = request.ensemble.weights
        self._known_from = evidence_from(self.prompt) if experts else len(self.prompt)
        self.own = np.full((len(self.weights), len(self.prompt)), np.nan)
        self.sequences = []
        for each in active_graph:
            sequence, known = prefixes.sequence(each, vocabulary, self.prompt, self._known_from)
            self.own[list(sequence.members), : known.shape[1]] = known
            self.sequences.append(sequence)
        self.seen = np.unique(self.prompt)
        self.last = -1

    def read_on(self) -> list[NDArray[np.float32]] | None:
        """Read a piece of the prompt: when that was the last one, each member's logits [vocabulary] of what follows."""
        logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(self.weights)
        end = min(min(sequence.read for sequence in self.sequences) + PIECE, len(self.prompt))
        for sequence in self.sequences:
            if sequence.read >= end:  # it knew more than others
                continue
            for chunk in sequence.forward(self.prompt[:end], min(end, max(sequence.read + 1, self._known_from))):
                sequence.record(chunk, self.prompt, self.own)
                for member, each in zip(sequence.members, chunk.logits, strict=True):
                    logits[member] = each[-1]
        if end < len(self.prompt):
            return None
        if self._posterior is not None:
            self._posterior.observe(self.own[:, self._known_from :])
            self.weights = self._posterior.weights
        return logits

    def learn(self, own: NDArray[np.float64]) -> None:
        """Hear what members gave the token that was chosen: float64 [members]."""
        if self._posterior is not None:
            self._posterior.hear(own)
            self.weights = self._posterior.weights

    def mix(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """The mixture's log-probabilities [vocabulary] from each member's [members, vocabulary]."""
        active = np.flatnonzero(self.weights)
        mixed = combine_log_probabilities(parts[active], self.weights[active], self.request.ensemble.combine)
        check_numbers(mixed[0])
        return mixed

    def penalized(self, logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The mixture's log-probabilities from each member's logits [vocabulary], tokens of the text penalised."""
        penalty = self.request.sampling.repetition_penalty
        return self.mix(np.stack([log_softmax(penalize_repetition(each, self.seen, penalty)) for each in logits]))


class ContinuousBatch:
    """Generation of sequences that come and go.

    Args:
        ensemble: Whose members serve, all with a weight above zero; requests have weights of their own.
        most: Sequences that are generated at once; others wait their turn.
        prefixes: Texts that were read before, and where prompts are kept.
    """

    def __init__(self, ensemble: Ensemble, most: int, prefixes: PrefixCache | None = None) -> None:
        self._prefixes = PrefixCache(0) if prefixes is None else prefixes
        self._active_graphs = ensemble.active_graphs()
        self._vocabulary, self._most, self._voices = ensemble.vocabulary, most, len(ensemble.weights)
        self._caches = [each.graph.new_cache(0) for each in self._active_graphs]
        self._waiting: deque[GenerationRequest] = deque()
        self._reading: _Row | None = None
        self._rows: list[_Row] = []
        self._parts = np.empty((self._voices, 0, self._vocabulary), np.float32)
        self._cancelled: set[GenerationRequest] = set()

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._waiting) + len(self._rows) + (self._reading is not None)

    def add(self, request: GenerationRequest) -> None:
        """Let a sequence in as soon as there is room."""
        self._waiting.append(request)

    def cancel(self, request: GenerationRequest) -> None:
        """Take a sequence out, whatever it may still have had to say."""
        self._cancelled.add(request)

    def step(self) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        """The next token of every sequence in the batch, and perhaps the first one of a sequence that joins it. One
        that failed is out of the batch, and its error is told.

        Raises:
            EdgemixError: A graph failed on all of them.
        """
        self._forget_cancelled()
        told = self._join()
        self._leave()  # it may have ended with its first token
        if self._rows:
            told += self._decode()
        self._leave()
        return told

    def close(self) -> None:
        """Free the caches."""
        self._drop_reading()
        for cache in self._caches:
            cache.free()
        self._rows = []
        self._waiting.clear()

    def _join(self) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        """Read on in the prompt of the next one; when it is read, the sequence joins."""
        if self._reading is None and self._waiting and len(self._rows) < self._most:
            request = self._waiting.popleft()
            try:
                self._reading = _Row(request, self._active_graphs, self._vocabulary, self._prefixes)
            except EdgemixError as error:
                return [(request, error)]
        row = self._reading
        if row is None:
            return []
        try:
            if (logits := row.read_on()) is None:
                return []
            token = self._choose(row, logits, np.stack([log_softmax(each) for each in logits]))
        except EdgemixError as error:
            self._drop_reading()
            return [(row.request, error)]
        self._reading = None
        for cache, sequence in zip(self._caches, row.sequences, strict=True):
            cache.append(sequence.cache)
            self._prefixes.keep(sequence, row.prompt, row.own[list(sequence.members)])
        self._rows.append(row)
        return [(row.request, token)]

    def _decode(self) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        new = np.array([[row.last] for row in self._rows])
        if self._parts.shape[1] != len(new):
            self._parts = np.empty((self._voices, len(new), self._vocabulary), np.float32)
        logits: list[NDArray[np.float32]] = []
        for (graph, _, _), cache in zip(self._active_graphs, self._caches, strict=True):
            logits += [each[:, : self._vocabulary] for each in graph.parts(graph.extend(cache, new))]
        for each, part in zip(logits, self._parts, strict=True):
            log_softmax(each, out=part)
        told: list[tuple[GenerationRequest, Token | EdgemixError]] = []
        for place, row in enumerate(self._rows):
            try:
                found = self._choose(row, [each[place] for each in logits], self._parts[:, place])
            except EdgemixError as error:
                row.request.budget = 0
                told.append((row.request, error))
            else:
                told.append((row.request, found))
        return told

    def _choose(self, row: _Row, logits: Sequence[NDArray[np.float32]], parts: NDArray[np.float32]) -> Token:
        """A row's next token, from each member's logits and log-probabilities [members, vocabulary]."""
        request, mixed = row.request, row.mix(parts)
        scores = mixed if request.sampling.repetition_penalty == 1 else row.penalized(logits)
        if request.grammar_state is not None:
            scores = rule_out(scores, request.grammar_state.allowed())
        token = choose_token(scores, request.sampling, request.generator)
        if request.grammar_state is not None:
            request.grammar_state.take([token])
        request.log_probabilities.append(float(mixed[token]))
        own = parts[:, token].astype(np.float64)
        if request.attribution:
            request.said.append(TokenAttribution(np.where(row.weights > 0, own, np.nan)[:, None], row.weights[:, None]))
        row.learn(own)
        row.last = token
        row.seen = np.union1d(row.seen, [token]) if request.sampling.repetition_penalty != 1 else row.seen
        request.budget -= 1
        reason = finish_reason(token, request.eos, request.budget)
        if reason is not None:
            request.budget = 0
        return Token(0, token, reason)

    def _leave(self) -> None:
        """Take finished rows out; the last one takes the place of each."""
        for place in range(len(self._rows) - 1, -1, -1):
            if self._rows[place].request.budget == 0:
                for cache in self._caches:
                    cache.drop(place)
                self._rows[place] = self._rows[-1]
                self._rows.pop()

    def _drop_reading(self) -> None:
        for sequence in self._reading.sequences if self._reading else ():
            sequence.close()
        self._reading = None

    def _forget_cancelled(self) -> None:
        if not self._cancelled:
            return
        gone, self._cancelled = self._cancelled, set()
        self._waiting = deque(request for request in self._waiting if request not in gone)
        if self._reading is not None and self._reading.request in gone:
            self._drop_reading()
        for row in self._rows:
            if row.request in gone:
                row.request.budget = 0
        self._leave()
