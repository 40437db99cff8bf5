"""Continuous batching: sequences join and leave a batch between its steps, each with settings of its own.

What a sequence yields does not depend on the others in the batch, and what fails for one does not end the others.
Prompts are read a piece at a time between steps, so that a long prompt does not hold up the other sequences.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.cancellation import failure
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

    from edgemix.errors import EdgemixError
    from edgemix.runtime.decoding.request import GenerationRequest
    from edgemix.runtime.graphs.decoder import DecoderGraph
    from edgemix.runtime.graphs.kv_cache import KVCache
    from edgemix.runtime.mixing.ensemble import ActiveGraph, Ensemble

PREFILL_CHUNK = 128
"""Tokens of a prompt that are read between two steps."""


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

        A sequence that failed leaves the batch, and its error is returned in the place of a token. Where a graph fails
        on a step of all sequences, each is tried alone: those that succeed go on.
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

    def reset(self) -> list[GenerationRequest]:
        """Drop all sequences and their caches, and return their requests; others may join afterwards."""
        dropped = [*self._waiting, *(row.request for row in self._rows)]
        dropped += [self._reading.request] if self._reading else []
        self.close()
        self._caches = [each.graph.new_cache(0) for each in self._active_graphs]
        return dropped

    def close(self) -> None:
        """Free the caches."""
        self._drop_reading()
        for cache in self._caches:
            cache.free()
        self._rows = []
        self._waiting.clear()
        self._cancelled.clear()

    def _join(self, chunk: int | None) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        """Read on in the next prompt; when all of it is read, its sequence joins."""
        if self._reading is None and self._waiting and len(self._rows) < self._max_sequences:
            request = self._waiting.popleft()
            try:
                self._reading = BatchSequence(request, self._active_graphs, self._vocabulary, self._prefixes)
            except BaseException as error:  # noqa: BLE001 - `failure` passes on what is not this text's alone
                return [(request, failure(error))]
            if self.on_join is not None:
                self.on_join(self._reading)
        row = self._reading
        if row is None:
            return []
        try:
            if not (logits := row.prefill(chunk)):
                return []
            token = row.choose(logits, np.stack([log_softmax(each) for each in logits]))
            for cache, state in zip(self._caches, row.states, strict=True):
                cache.append(state.cache)
        except BaseException as error:  # noqa: BLE001 - `failure` passes on what is not this text's alone
            for cache in self._caches:
                if cache.batch > len(self._rows):
                    cache.drop(cache.batch - 1)
            failed = failure(error)
            self._drop_reading()
            return [(row.request, failed)]
        self._reading = None
        self._rows.append(row)
        states, row.states = row.states, []
        for state in states:
            self._prefixes.keep(state, row.request.prompt, row.log_probabilities[list(state.members)])
        return [(row.request, token)]

    def _decode(self) -> list[tuple[GenerationRequest, Token | EdgemixError]]:
        new = np.array([[row.last] for row in self._rows])
        if self._log_probabilities.shape[1] != len(new):
            self._log_probabilities = np.empty((self._members, len(new), self._vocabulary), np.float32)
        logits, failed = self._forward(new)
        for each, out in zip(logits, self._log_probabilities, strict=True):
            log_softmax(each, out=out)
        results: list[tuple[GenerationRequest, Token | EdgemixError]] = []
        for index, row in enumerate(self._rows):
            try:
                if index in failed:
                    raise failed[index]
                token = row.choose([each[index] for each in logits], self._log_probabilities[:, index])
            except BaseException as error:  # noqa: BLE001 - `failure` passes on what is not this text's alone
                results.append((row.request, failure(error)))
                row.request.budget = 0
            else:
                results.append((row.request, token))
        return results

    def _forward(self, new: NDArray[np.int64]) -> tuple[list[NDArray[np.float32]], dict[int, EdgemixError]]:
        """Read a token of every row, int64 [rows, 1].

        Returns:
            For each member logits [rows, vocabulary], and the errors of the rows that failed, by their index.
        """
        lengths = [cache.lengths.copy() for cache in self._caches]
        failed: dict[int, EdgemixError] = {}
        try:
            return self._of_members([graph.extend(cache, new) for graph, cache in self._graphs()]), failed
        except BaseException as error:  # noqa: BLE001 - `failure` passes on what is not a text's alone
            failure(error)
        for cache, before in zip(self._caches, lengths, strict=True):
            cache.rollback(before)
        logits = [self._forward_apart(graph, cache, new, failed) for graph, cache in self._graphs()]
        return self._of_members(logits), failed

    def _forward_apart(
        self, graph: DecoderGraph, cache: KVCache, new: NDArray[np.int64], failed: dict[int, EdgemixError]
    ) -> NDArray[np.float32]:
        """Read a token of every row alone, but for those that failed; adds to them."""
        parts = cache.split([1] * len(new))
        width = graph.vocabulary if graph.member_count == 1 else (graph.member_count, graph.vocabulary)
        logits = np.zeros((len(new), *np.atleast_1d(width)), np.float32)
        for index, part in enumerate(parts):
            if index in failed:
                continue
            try:
                logits[index] = graph.extend(part, new[index : index + 1])[0]
            except BaseException as error:  # noqa: BLE001 - `failure` passes on what is not a text's alone
                failed[index] = failure(error)
        cache.join(parts)
        return logits

    def _graphs(self) -> Iterable[tuple[DecoderGraph, KVCache]]:
        return zip((each.graph for each in self._active_graphs), self._caches, strict=True)

    def _of_members(self, logits: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Return the logits [rows, vocabulary] of each active member from those of the graphs."""
        members = []
        for (graph, local_indices, _), each in zip(self._active_graphs, logits, strict=True):
            parts = graph.parts(each)
            members += [parts[index][:, : self._vocabulary] for index in local_indices]
        return members

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
