"""Prefill and decode: token ids in, token ids out. Text is somebody else's concern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edgemix.runtime.mixing import check_numbers, combine_log_probabilities, log_softmax
from edgemix.runtime.sampling import choose_token, penalise_repetition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.member import Member, Tokens
    from edgemix.runtime.mixing import Combine
    from edgemix.runtime.sampling import Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Blend:
    """Members and how they are mixed.

    Attributes:
        members: Graphs that speak for a member with a weight above zero; the others need not be evaluated.
        weights: float64 [voices of all of them], sum one.
        combine: See `mixing`.
        vocabulary: The tokenizer's; logits beyond it are cut off.
    """

    members: tuple[Member, ...]
    weights: NDArray[np.float64]
    combine: Combine
    vocabulary: int

    @classmethod
    def of(cls, members: Sequence[Member], weights: NDArray[np.float64], combine: Combine, vocabulary: int) -> Blend:
        """The blend of those members that weigh something, from weights of all members' voices."""
        shares = np.split(weights, np.cumsum([member.voices for member in members])[:-1])
        heavy = [(member, share) for member, share in zip(members, shares, strict=True) if share.any()]
        return cls(
            tuple(member for member, _ in heavy), np.concatenate([share for _, share in heavy]), combine, vocabulary
        )


class State:
    """A batch of sequences as every member of a blend has read them."""

    def __init__(self, blend: Blend, batch: int) -> None:
        self._blend = blend
        self._caches = [member.new_cache(batch) for member in blend.members]
        self._heavy: list[int] = np.flatnonzero(blend.weights).tolist()
        self._weights = blend.weights[self._heavy]
        self._parts = self._buffer(batch)

    def extend(self, tokens: Tokens) -> NDArray[np.float32]:
        """Read at least one new token a row: the mixture's log-probabilities [batch, vocabulary] of what follows.

        They may lie in a buffer that the next call overwrites.

        Raises:
            EdgemixError: A graph fails, or computes something that is not a number.
        """
        return self._mix(self._read(tokens))

    def extend_penalised(
        self, tokens: Tokens, penalise: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `extend`, with what the mixture says when `penalise` has changed each member's logits [batch, vocabulary].

        A penalty that depends on the scale of scores means something for a model's own logits only.
        """
        logits = self._read(tokens)
        plain = self._mix(logits).copy()
        return plain, self._mix([penalise(each) for each in logits])

    def _read(self, tokens: Tokens) -> list[NDArray[np.float32]]:
        """The logits [batch, vocabulary] of each voice that weighs something, in its cache's buffer."""
        pairs = zip(self._blend.members, self._caches, strict=True)
        voices = [part for member, cache in pairs for part in member.parts(member.extend(cache, tokens))]
        return [voices[i][:, : self._blend.vocabulary] for i in self._heavy]

    def _mix(self, logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        for each, part in zip(logits, self._parts, strict=True):
            log_softmax(each, out=part)
        mixed = combine_log_probabilities(self._parts, self._weights, self._blend.combine)
        check_numbers(mixed.max())
        return mixed

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in ascending order."""
        for cache in self._caches:
            cache.select(rows)
        self._parts = self._buffer(len(rows))

    def close(self) -> None:
        """Free the caches."""
        for cache in self._caches:
            cache.free()

    def _buffer(self, batch: int) -> NDArray[np.float32]:
        """Room for each member's log-probabilities; used at every step, as fresh memory costs more than arithmetic."""
        return np.empty((len(self._heavy), batch, self._blend.vocabulary), np.float32)


class Token(NamedTuple):
    """One new token of one sequence.

    Attributes:
        sequence: Index of the prompt.
        log_probability: Under the mixture, before temperature and filters.
        finish_reason: Why it is the last one; None if it is not.
    """

    sequence: int
    id: int
    log_probability: float
    finish_reason: FinishReason | None


@dataclass(slots=True)
class _Sequence:
    index: int
    generator: np.random.Generator
    budget: int
    seen: NDArray[np.int64]
    last: int = -1
    finished: bool = False


class Decoding:
    """Generation of a batch under way: every `step` gives each sequence that is not finished its next token.

    Finished sequences leave the batch. The result of a sequence does not depend on the others.

    Args:
        blend: What generates.
        prompts: Token ids, at least one each.
        sampling: How tokens are chosen.
        seeds: One a prompt; None draws from the system's entropy.
        max_new_tokens: Most tokens for each.
        context: Most tokens that are read of a sequence; what would follow ends with finish reason "length".
        eos: Ids that finish a sequence with "stop"; the id itself is the last token.
    """

    def __init__(
        self,
        blend: Blend,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int | None],
        max_new_tokens: int,
        context: int,
        eos: Iterable[int],
    ) -> None:
        self._sampling = sampling
        self._eos = frozenset(eos)
        self._prompts: list[NDArray[np.int64]] | None = [np.asarray(prompt, np.int64) for prompt in prompts]
        self._state = State(blend, len(prompts))
        self._active = [
            _Sequence(
                index,
                np.random.default_rng(seed),
                # The last token is never read, so it may lie one beyond the context.
                budget=min(max_new_tokens, context - len(prompt) + 1),
                seen=np.unique(prompt),
            )
            for index, (prompt, seed) in enumerate(zip(self._prompts, seeds, strict=True))
        ]

    def step(self) -> list[Token]:
        """The next token of each unfinished sequence; the first step reads the prompts. Empty when all are finished."""
        self._drop_finished()
        if not self._active:
            return []
        tokens: Tokens = np.array([[sequence.last] for sequence in self._active])
        if self._prompts is not None:
            tokens, self._prompts = self._prompts, None
        if self._sampling.repetition_penalty == 1:
            log_probabilities = scores = self._state.extend(tokens)
        else:
            log_probabilities, scores = self._state.extend_penalised(tokens, self._penalise)
        chosen = self._choose(scores)
        return [
            self._advance(sequence, token, float(row[token]))
            for sequence, token, row in zip(self._active, chosen, log_probabilities, strict=True)
        ]

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

    def _penalise(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        penalty = self._sampling.repetition_penalty
        rows = zip(logits, self._active, strict=True)
        return np.stack([penalise_repetition(row, sequence.seen, penalty) for row, sequence in rows])

    def _choose(self, scores: NDArray[np.float32]) -> list[int]:
        if self._sampling.temperature == 0:
            return [int(token) for token in scores.argmax(axis=-1)]
        return [
            choose_token(row, self._sampling, sequence.generator)
            for row, sequence in zip(scores, self._active, strict=True)
        ]

    def _advance(self, sequence: _Sequence, token: int, log_probability: float) -> Token:
        sequence.last = token
        sequence.budget -= 1
        if self._sampling.repetition_penalty != 1:
            sequence.seen = np.union1d(sequence.seen, [token])
        reason: FinishReason | None = "stop" if token in self._eos else "length" if sequence.budget == 0 else None
        sequence.finished = reason is not None
        return Token(sequence.index, token, log_probability, reason)
