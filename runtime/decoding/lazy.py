"""Lazy evaluation of a mixture: one sequence, whose members are evaluated only where the result depends on them.

The *positions* of a draft are the one after the text and the one after each drafted token; one call of a graph predicts
all of them. Of P = sum_i w_i P_i, with the members S evaluated so far, the partial probabilities m = sum_S w_i P_i are
known, and with the remaining weight w = sum_not_S w_i

    m(y) <= P(y) <= m(y) + w    for every token y

So the most probable token is certain when it leads in m by more than w; a drafted token's acceptance is certain when
both bounds agree; and a token sampled from one member, which is itself sampled by its weight, is a sample of the
mixture. Members that were left out read on later, several tokens in a call.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.mixing.adaptive import PERIOD, Posterior, evidence_from
from edgemix.runtime.mixing.arithmetic import (
    check_numbers,
    linear,
    log_linear,
    log_softmax,
    target_log_probabilities,
)
from edgemix.runtime.mixing.attribution import TokenAttribution
from edgemix.runtime.sequences.prefix_cache import PrefixCache
from edgemix.runtime.text.grammar import only_one, rule_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.sequences.state import LogitsChunk, SequenceState

    Alter = Callable[[NDArray[np.float32], int], NDArray[np.float32]]
    Allow = Callable[[int], NDArray[np.bool_]]

_ROOM = 256
"""Tokens after the prompt that memory is reserved for at first."""
ROUNDING = 1e-5
"""Rounding error of a float32 sum of probabilities that is about one."""
_FAINT = 1e-30
"""Near the smallest float32: probabilities below it are compared by their logarithms."""


class LazyState:
    """A text, the members' log-probabilities of it, and a draft of what may come next.

    Args:
        ensemble: The members.
        prompt: int64 [tokens], at least one.
        alter: Changes a member's logits [vocabulary] for a position of the draft (a penalty); None changes nothing.
        allow: Which tokens are allowed at a position of the draft, bool [vocabulary]; None allows all.
        prefixes: Texts that were read before, and where this one will be kept.
        on_call: Called after every call of a graph on the draft with the graph's first member, the tokens read, the
            seconds including the work on the results, and whether it verified a draft (else it extended one).

    Attributes:
        length: Number of tokens of the text.
        weights: float64 [members], at the draft's positions.
        calls: Calls of graphs so far, without those that only caught up with the text.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        prompt: NDArray[np.int64],
        alter: Alter | None = None,
        *,
        allow: Allow | None = None,
        prefixes: PrefixCache | None = None,
        on_call: Callable[[int, int, float, bool], None] = lambda *_: None,
    ) -> None:
        self._ensemble, self._alter, self._allow, self._on_call = ensemble, alter, allow, on_call
        self._prefixes = PrefixCache(0) if prefixes is None else prefixes
        active, vocabulary = ensemble.active, ensemble.vocabulary
        self._posterior = Posterior(ensemble.prior.narrowed(active)) if ensemble.prior else None
        self.weights = ensemble.weights[active]
        self.length = self._start = len(prompt)
        self._ids = np.zeros(2 * len(prompt) + _ROOM, np.int64)
        self._ids[: len(prompt)] = prompt
        self._log_probabilities = np.full((len(active), len(self._ids)), np.nan)
        self._weight_path = np.full((len(active), len(self._ids)), np.nan)
        self._observed = evidence_from(prompt) if self._posterior else self._start
        self._sequences = []
        for active_graph in ensemble.active_graphs():
            sequence, known = self._prefixes.sequence(active_graph, vocabulary, prompt, self._observed)
            self._log_probabilities[list(sequence.members), : known.shape[1]] = known
            self._sequences.append(sequence)
        self._geometric: list[float] = []
        self._drafted = 0
        self._logits: dict[int, list[NDArray[np.float32]]] = {}
        self._norms: dict[tuple[int, int], float] = {}
        self._partial = np.empty(vocabulary, np.float32)
        self._part = np.empty(vocabulary, np.float32)
        self._partial_of: tuple[int, set[int]] = (-1, set())
        self.calls = 0

    @property
    def text(self) -> NDArray[np.int64]:
        """The token ids, int64 [length]."""
        return self._ids[: self.length]

    @property
    def room(self) -> int:
        """Most tokens of a draft that ends before the adaptive weights change."""
        if self._posterior is None:
            return 1 << 30
        return PERIOD - 1 - (self.length - self._start) % PERIOD

    @property
    def nothing_evaluated(self) -> bool:
        """Whether no member has been evaluated on this draft."""
        return not self._logits

    @property
    def first_evaluated(self) -> int:
        """The first member of the graph that was evaluated first on this draft."""
        return next(iter(self._logits))

    @property
    def not_evaluated(self) -> list[int]:
        """The first member of each graph that has not been evaluated on this draft."""
        return [sequence.members[0] for sequence in self._sequences if sequence.members[0] not in self._logits]

    @property
    def remaining_weight(self) -> float:
        """The weight of the members that have not been evaluated on this draft."""
        return float(sum(self.weights[member] for member in self._members_left()))

    def begin_draft(self, draft: Sequence[int]) -> None:
        """Begin a draft of at most `room` tokens; it may be empty."""
        end = self.length + len(draft)
        self._reserve(end + 1)
        self._ids[self.length : end] = draft
        self._drafted, self._partial_of = len(draft), (-1, set())
        self._logits, self._norms = {}, {}
        if self._posterior is not None and (self.length - self._start) % PERIOD == 0:
            self.evaluate_all()
            self._posterior.observe(self._log_probabilities[:, self._observed : self.length])
            self._observed, self.weights = self.length, self._posterior.weights

    def evaluate_next(self) -> None:
        """Evaluate the graph of most weight among those not evaluated."""
        waiting = [sequence for sequence in self._sequences if sequence.members[0] not in self._logits]
        self._evaluate(max(waiting, key=lambda sequence: sum(self.weights[member] for member in sequence.members)))

    def evaluate_all(self) -> None:
        """Evaluate every graph that has not been."""
        while self._members_left():
            self.evaluate_next()

    def evaluate_member(self, member: int) -> None:
        """Evaluate a member, if it has not been."""
        if member not in self._logits:
            self._evaluate(next(sequence for sequence in self._sequences if member in sequence.members))

    def partial_probabilities(self, position: int) -> NDArray[np.float32]:
        """Return sum_i w_i P_i float32 [vocabulary] over the members evaluated so far, at a position of the draft.

        It is not the whole mixture as long as there is `remaining_weight`, and lies in a buffer that the next call
        overwrites.
        """
        at, added = self._partial_of
        if at != position:
            added = set()
            self._partial.fill(0)
        for member in self._logits.keys() - added:
            self._partial += self._probabilities(member, position, self.weights[member])
        self._partial_of = position, set(self._logits)
        return self._partial

    def member_probabilities(self, member: int, position: int) -> NDArray[np.float32]:
        """Return one member's P_i float32 [vocabulary], in a buffer that the next call overwrites."""
        return self._probabilities(member, position, 1.0)

    def certain_argmax(self, position: int) -> int:
        """Return the mixture's most probable token at a position; evaluates as many members as certainty takes."""
        if self._ensemble.combine != "linear":
            return int(self.scores(position).argmax())
        while True:
            token, certainty = self.argmax_with_margin(position)
            if certainty > 1:
                return token
            self.evaluate_next()

    def argmax_with_margin(self, position: int) -> tuple[int, float]:
        """Return the token that is most probable by the members evaluated so far (at least by the one of most weight),
        and its margin in units of what the other members could change: above 1 it is the mixture's, too.
        """
        if (only := self.only_allowed(position)) is not None:
            return only, math.inf
        if not self._logits:
            self.evaluate_next()
        partial = self.partial_probabilities(position)
        if self._allow is not None:
            partial = np.where(self._allow(position), partial, np.float32(-1))
        token = int(partial.argmax())
        lead, remaining = partial[token], self.remaining_weight
        if not remaining:
            return int(self.scores(position).argmax()) if lead < _FAINT else token, math.inf
        partial[token] = -1
        second = partial.max()
        partial[token] = lead
        return token, float(lead - second) / (remaining + ROUNDING)

    def only_allowed(self, position: int) -> int | None:
        """Return the token that is the only one allowed at a position, if there is one."""
        return None if self._allow is None else only_one(self._allow(position))

    def truncate_draft(self, drafted: int) -> None:
        """Keep only the first `drafted` tokens of the draft."""
        if drafted < self._drafted:
            self._drafted = drafted
            self._logits = {member: logits[: drafted + 1] for member, logits in self._logits.items()}
            for sequence in self._sequences:
                sequence.truncate(self.length + drafted)

    def extend_draft(self, tokens: Sequence[int]) -> None:
        """Add tokens to the draft, which stays within `room`; members evaluated so far predict what follows each."""
        begin = self.length + self._drafted
        end = begin + len(tokens)
        self._reserve(end + 1)
        self._ids[begin:end] = tokens
        self._drafted += len(tokens)
        for sequence in self._sequences:
            if sequence.members[0] in self._logits:
                for member in sequence.members:
                    self._logits[member] = [_owned(row) for row in self._logits[member]]
                for chunk in self._forward(sequence, end, begin + 1, verifies=False):
                    for member, rows in zip(sequence.members, chunk.logits, strict=True):
                        self._logits[member] += [row.copy() for row in rows]

    def scores(self, position: int) -> NDArray[np.float32]:
        """Return the whole mixture's log-probabilities float32 [vocabulary] at a position, a new array, with -inf where
        a token is not allowed; evaluates all members.
        """
        self.evaluate_all()
        members = sorted(self._logits)
        if self._ensemble.combine != "linear":
            mixed = log_linear(np.stack([self._altered(member, position) for member in members]), self.weights[members])
        else:
            with np.errstate(divide="ignore"):
                mixed = np.log(self.partial_probabilities(position))
        check_numbers(mixed[0])
        if self._allow is None:
            return mixed
        mixed = rule_out(mixed, allowed := self._allow(position))
        if self._ensemble.combine == "linear" and mixed.max() < math.log(_FAINT):
            parts = np.stack([log_softmax(self._altered(member, position)) for member in members])
            mixed = rule_out(linear(parts, self.weights[members]), allowed)
        return mixed

    def accept(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text: the draft's first ones, and one that the mixture has chosen after them."""
        count, begin = len(tokens), self.length
        new: NDArray[np.int64] = np.asarray(tokens, np.int64)
        self._ids[begin : begin + count] = new
        self._weight_path[:, begin : begin + count] = self.weights[:, None]
        for member, logits in self._logits.items():
            known = [self._norms.get((member, position)) for position in range(count)]
            self._log_probabilities[member, begin : begin + count] = [
                target_log_probabilities(logits[position][None], new[position, None])[0]
                if norm is None
                else logits[position][token] - norm
                for position, (token, norm) in enumerate(zip(tokens, known, strict=True))
            ]
        if self._ensemble.combine != "linear":
            members = sorted(self._logits)
            for position, token in enumerate(tokens):
                mixed = log_linear(
                    np.stack([self._logits[member][position] for member in members]), self.weights[members]
                )
                self._geometric.append(float(mixed[token]))
        self.length += count
        for sequence in self._sequences:
            sequence.truncate(self.length - 1)

    def log_probabilities(self) -> NDArray[np.float64]:
        """Return float64 [tokens], nats: of the tokens after the prompt, under the mixture without `alter`."""
        if self._ensemble.combine != "linear":
            return np.array(self._geometric)
        found = self.attribution()
        mixed: NDArray[np.float64] = np.logaddexp.reduce(found.log_probabilities + np.log(found.weights), axis=0)
        return mixed

    def attribution(self) -> TokenAttribution:
        """Return the attribution of the tokens after the prompt; members that were left out read on for that."""
        for sequence in self._sequences:
            if sequence.read < self.length - 1:
                for chunk in sequence.forward(self._ids[: self.length - 1], max(self._start, sequence.read + 1)):
                    sequence.record(chunk, self.text, self._log_probabilities)
        new = slice(self._start, self.length)
        return TokenAttribution(self._log_probabilities[:, new], self._weight_path[:, new])

    def close(self) -> None:
        """Hand the caches to the prefix cache."""
        for sequence in self._sequences:
            sequence.truncate(self.length - 1)  # a draft that was interrupted
            self._prefixes.keep(sequence, self.text, self._log_probabilities[list(sequence.members), : self.length])
        self._sequences = []

    def _members_left(self) -> list[int]:
        return [member for sequence in self._sequences for member in sequence.members if member not in self._logits]

    def _evaluate(self, sequence: SequenceState) -> None:
        """Let a graph read to the end of the draft: record its log-probabilities of the text, keep its logits."""
        end = self.length + self._drafted
        first = min(self.length, max(sequence.read + 1, self._observed))
        for member in sequence.members:
            self._logits[member] = []
        for chunk in self._forward(sequence, end, first):
            sequence.record(chunk, self.text, self._log_probabilities)
            last = chunk.start + len(chunk.logits[0]) > end
            for member, logits in zip(sequence.members, chunk.logits, strict=True):
                ahead = logits[max(0, self.length - chunk.start) :]
                self._logits[member] += [*(ahead if last else ahead.copy())]  # the next call overwrites them

    def _forward(
        self, sequence: SequenceState, end: int, first: int, *, verifies: bool = True
    ) -> Iterator[LogitsChunk]:
        begun, read = time.perf_counter(), end - sequence.read
        yield from sequence.forward(self._ids[:end], first)
        self._on_call(sequence.members[0], read, time.perf_counter() - begun, verifies)
        self.calls += 1

    def _altered(self, member: int, position: int) -> NDArray[np.float32]:
        logits = self._logits[member][position]
        return logits if self._alter is None else self._alter(logits, position)

    def _probabilities(self, member: int, position: int, weight: float) -> NDArray[np.float32]:
        """Weight * softmax(logits), in a buffer."""
        logits, part = self._altered(member, position), self._part
        peak = logits.max()
        np.subtract(logits, peak, out=part)
        np.exp(part, out=part)
        total = part.sum()
        check_numbers(total)
        if self._alter is None:
            self._norms[member, position] = float(peak) + math.log(total)
        part *= np.float32(weight) / total
        return part

    def _reserve(self, tokens: int) -> None:
        """Reserve memory for `tokens` tokens."""
        if tokens <= len(self._ids):
            return
        more = 2 * tokens - len(self._ids)
        self._ids = np.pad(self._ids, (0, more))
        self._log_probabilities, self._weight_path = (
            np.pad(each, ((0, 0), (0, more)), constant_values=np.nan)
            for each in (self._log_probabilities, self._weight_path)
        )


def _owned(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a copy of a row that may lie in a graph's buffer, which its next call overwrites."""
    return row if row.base is None else row.copy()
