"""Prefill and decode: token ids in, token ids out. Text is somebody else's concern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edgemix.runtime.decoding.sampling import choose_token, penalize_repetition
from edgemix.runtime.mixing.adaptive import Posterior, evidence_from
from edgemix.runtime.mixing.arithmetic import check_numbers, combine_log_probabilities, log_softmax
from edgemix.runtime.mixing.attribution import TokenAttribution
from edgemix.runtime.sequences.state import SequenceState
from edgemix.runtime.text.grammar import rule_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.graphs.decoder import Tokens
    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.text.grammar import GrammarState

FinishReason = Literal["stop", "length"]


class State:
    """A batch of sequences as every member of an ensemble has read them: all prompts first, then token by token."""

    def __init__(self, ensemble: Ensemble, batch: int) -> None:
        self._ensemble, self._heavy = ensemble, ensemble.active
        self._caches = [graph.new_cache(batch) for graph in ensemble.graphs]
        self._parts = self._buffer(batch)
        self._weights = ensemble.weights[self._heavy]
        experts = ensemble.prior.narrowed(self._heavy) if ensemble.prior else None
        self._posteriors = [Posterior(experts) for _ in range(batch)] if experts else []

    def begin(self, prompts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """Read prompts, of at least one token each: each member's logits [batch, vocabulary] of what follows.

        They lie in buffers that the next call overwrites, and members that weigh nothing are left out.

        Raises:
            EdgemixError: A graph fails.
        """
        if not self._posteriors:
            return self._read(prompts)
        logits = [np.empty((len(prompts), self._ensemble.vocabulary), np.float32) for _ in self._heavy]
        own = [np.empty((len(self._heavy), len(prompt))) for prompt in prompts]
        for active_graph, cache in zip(self._ensemble.active_graphs(), self._caches, strict=True):
            rows = cache.split([len(prompt) + 1 for prompt in prompts])  # a last token alone is read in a pair
            for row, (prompt, part) in enumerate(zip(prompts, rows, strict=True)):
                sequence = SequenceState(active_graph, self._ensemble.vocabulary, part)
                for chunk in sequence.forward(prompt, evidence_from(prompt)):
                    sequence.record(chunk, prompt, own[row])
                    for member, each in zip(sequence.members, chunk.logits, strict=True):
                        logits[member][row] = each[-1]
            cache.join(rows)
        for prompt, posterior, said in zip(prompts, self._posteriors, own, strict=True):
            posterior.observe(said[:, evidence_from(prompt) :])
        self._weigh()
        return logits

    def extend(self, tokens: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Read a new token a row, int64 [batch]: as `begin`."""
        if self._posteriors:
            own = self._parts[:, range(len(tokens)), tokens].astype(np.float64)
            for said, posterior in zip(own.T, self._posteriors, strict=True):
                posterior.hear(said)
            self._weigh()
        return self._read(tokens[:, None])

    def mix(self, logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The mixture's log-probabilities [batch, vocabulary], from what members said last.

        They may lie in a buffer that the next call overwrites.

        Raises:
            EdgemixError: They are not numbers.
        """
        return self._mix(logits, self._parts)

    def mix_altered(self, logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The same from logits that somebody has changed, and that are no evidence of anything."""
        return self._mix(logits, self._buffer(len(logits[0])))

    def spoken(self, row: int, token: int) -> TokenAttribution:
        """What members, as `mix` heard them last, gave a token of a row, and what they weighed."""
        weights = self._weights if self._weights.ndim == 1 else self._weights[:, row]
        return TokenAttribution(self._parts[:, row, token].astype(np.float64)[:, None], weights[:, None])

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in ascending order."""
        for cache in self._caches:
            cache.select(rows)
        if self._posteriors:
            self._posteriors = [self._posteriors[row] for row in rows]
            self._parts = self._parts[:, rows]
            self._weigh()
        else:
            self._parts = self._buffer(len(rows))

    def close(self) -> None:
        """Free the caches."""
        for cache in self._caches:
            cache.free()

    def _read(self, tokens: Tokens) -> list[NDArray[np.float32]]:
        members = []
        for graph, cache in zip(self._ensemble.graphs, self._caches, strict=True):
            members += graph.parts(graph.extend(cache, tokens))
        return [members[i][:, : self._ensemble.vocabulary] for i in self._heavy.tolist()]

    def _mix(self, logits: Sequence[NDArray[np.float32]], parts: NDArray[np.float32]) -> NDArray[np.float32]:
        for each, part in zip(logits, parts, strict=True):
            log_softmax(each, out=part)
        mixed = combine_log_probabilities(parts, self._weights, self._ensemble.combine)
        check_numbers(mixed[..., 0])
        return mixed

    def _weigh(self) -> None:
        """Each row's own weights: float64 [members, rows]."""
        self._weights = np.stack([posterior.weights for posterior in self._posteriors], axis=1)

    def _buffer(self, batch: int) -> NDArray[np.float32]:
        """Room for each member's log-probabilities; used at every step, as fresh memory costs more than arithmetic."""
        return np.empty((len(self._heavy), batch, self._ensemble.vocabulary), np.float32)


class Token(NamedTuple):
    """One new token of one sequence.

    Attributes:
        sequence: Index of the prompt.
        finish_reason: Why it is the last one; None if it is not.
    """

    sequence: int
    id: int
    finish_reason: FinishReason | None


def finish_reason(token: int, eos: frozenset[int], budget: int) -> FinishReason | None:
    """Why a token is the last one, if it is: it ends texts, or leaves a budget of no more."""
    return "stop" if token in eos else "length" if budget == 0 else None


@dataclass(slots=True)
class _Sequence:
    index: int
    generator: np.random.Generator
    budget: int
    seen: NDArray[np.int64]
    grammar_state: GrammarState | None = None
    last: int = -1
    finished: bool = False


class Decoding:
    """Generation of a batch under way: every `step` gives each sequence that is not finished its next token.

    Finished sequences leave the batch. The result of a sequence does not depend on the others.

    Args:
        ensemble: What generates.
        prompts: Token ids, at least one each.
        sampling: How tokens are chosen.
        seeds: One a prompt; None draws from the system's entropy.
        max_new_tokens: Most tokens for each.
        context: Most tokens that are read of a sequence; what would follow ends with finish reason "length".
        eos: Ids that finish a sequence with "stop"; the id itself is the last token.
        followers: One a prompt, where texts must have a given form.
        attribution: Remember what members said, for `spoken`.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int | None],
        max_new_tokens: int,
        context: int,
        eos: Iterable[int],
        grammar_states: Sequence[GrammarState] = (),
        attribution: bool = False,
    ) -> None:
        self._sampling = sampling
        self._eos = frozenset(eos)
        self._prompts: list[NDArray[np.int64]] | None = [np.asarray(prompt, np.int64) for prompt in prompts]
        self._state = State(ensemble, len(prompts))
        self._log_probabilities: list[list[float]] = [[] for _ in prompts]
        self._attribution = attribution
        self._spoken: list[list[TokenAttribution]] = [[] for _ in prompts]
        self._active = [
            _Sequence(
                index,
                np.random.default_rng(seed),
                # The last token is never read, so it may lie one beyond the context.
                budget=min(max_new_tokens, context - len(prompt) + 1),
                seen=np.unique(prompt),
                grammar_state=grammar_states[index] if grammar_states else None,
            )
            for index, (prompt, seed) in enumerate(zip(self._prompts, seeds, strict=True))
        ]

    def step(self) -> list[Token]:
        """The next token of each unfinished sequence; the first step reads the prompts. Empty when all are finished."""
        self._drop_finished()
        if not self._active:
            return []
        if self._prompts is not None:
            prompts, self._prompts = self._prompts, None
            logits = self._state.begin(prompts)
        else:
            logits = self._state.extend(np.array([sequence.last for sequence in self._active]))
        log_probabilities = self._state.mix(logits)
        if self._sampling.repetition_penalty == 1:
            chosen = self._choose(log_probabilities)
        else:
            chosen = self._choose(self._state.mix_altered([self._penalize(each) for each in logits]))
        if self._attribution:
            for row, (sequence, token) in enumerate(zip(self._active, chosen, strict=True)):
                self._spoken[sequence.index].append(self._state.spoken(row, token))
        return [
            self._advance(sequence, token, float(row[token]))
            for sequence, token, row in zip(self._active, chosen, log_probabilities, strict=True)
        ]

    def log_probabilities(self, sequence: int) -> NDArray[np.float64]:
        """Of a sequence's tokens so far, under the mixture, before temperature and filters: float64 [tokens], nats."""
        return np.array(self._log_probabilities[sequence], np.float64)

    def spoken(self, sequence: int, first: int = 0) -> TokenAttribution:
        """What members that weigh something gave a sequence's tokens so far, from one of them on."""
        return TokenAttribution.joined(self._spoken[sequence][first:])

    def finish(self, sequence: int) -> None:
        """Take a sequence out, whatever it may still have had to say."""
        for active in self._active:
            active.finished |= active.index == sequence

    def close(self) -> None:
        """Free the caches."""
        self._state.close()
        self._active = []

    def _drop_finished(self) -> None:
        keep = [row for row, sequence in enumerate(self._active) if not sequence.finished]
        if len(keep) < len(self._active):
            self._active = [self._active[row] for row in keep]
            if keep:
                self._state.select(keep)
            else:
                self._state.close()

    def _penalize(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        penalty = self._sampling.repetition_penalty
        rows = zip(logits, self._active, strict=True)
        return np.stack([penalize_repetition(row, sequence.seen, penalty) for row, sequence in rows])

    def _choose(self, scores: NDArray[np.float32]) -> list[int]:
        rows = [
            row if sequence.grammar_state is None else rule_out(row, sequence.grammar_state.allowed())
            for row, sequence in zip(scores, self._active, strict=True)
        ]
        return [
            choose_token(row, self._sampling, sequence.generator)
            for row, sequence in zip(rows, self._active, strict=True)
        ]

    def _advance(self, sequence: _Sequence, token: int, log_probability: float) -> Token:
        sequence.last = token
        self._log_probabilities[sequence.index].append(log_probability)
        sequence.budget -= 1
        if sequence.grammar_state is not None:
            sequence.grammar_state.take([token])
        if self._sampling.repetition_penalty != 1:
            sequence.seen = np.union1d(sequence.seen, [token])
        reason = finish_reason(token, self._eos, sequence.budget)
        sequence.finished = reason is not None
        return Token(sequence.index, token, reason)
