"""One sequence under a mixture, whose members are asked only where the answer depends on them.

A *window* is a stretch of places that one call of a graph speaks on: the place behind the text, and behind each token
of a draft. Of P = sum_i w_i P_i, with the members S asked so far, m = sum_S w_i P_i is known; with w = sum_not_S w_i

    m(y) <= P(y) <= m(y) + w    for every token y

So the most probable token is certain when m leads by more than w; a draft's acceptance when both ends say the same; and
a token drawn from one member, itself drawn by its weight, is a token drawn from the mixture. Members that were left out
read on later, several tokens in a call.
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
"""Tokens beside the prompt that there is room for at first."""
ROUNDING = 1e-5
"""What float32 may lose in a sum of probabilities that is about one."""
_FAINT = 1e-30
"""A probability that float32 hardly holds: what is below is compared by its logarithm."""


class LazyState:
    """A text, what members have said of it, and a window on what may come.

    Args:
        ensemble: The members.
        prompt: int64 [tokens], at least one.
        alter: Changes a member's logits [vocabulary] for a place of the window (a penalty); None changes nothing.
        allow: Which tokens the mixture may take at a place of the window, bool [vocabulary]; None allows all.
        prefixes: Texts that were read before, and where this one will be kept.
        called: Told of every call of a window: the graph's first member, tokens read, seconds with what is done with
            their answers, and whether it verifies a draft (or lengthens it).

    Attributes:
        length: Tokens of the text.
        weights: float64 [members], at the window's places.
        asked: Calls of graphs so far, but for those that only read on.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        prompt: NDArray[np.int64],
        alter: Alter | None = None,
        *,
        allow: Allow | None = None,
        prefixes: PrefixCache | None = None,
        called: Callable[[int, int, float, bool], None] = lambda *_: None,
    ) -> None:
        self._ensemble, self._alter, self._allow, self._called = ensemble, alter, allow, called
        self._prefixes = PrefixCache(0) if prefixes is None else prefixes
        active, vocabulary = ensemble.active, ensemble.vocabulary
        self._posterior = Posterior(ensemble.prior.narrowed(active)) if ensemble.prior else None
        self.weights = ensemble.weights[active]
        self.length = self._start = len(prompt)
        self._ids = np.zeros(2 * len(prompt) + _ROOM, np.int64)
        self._ids[: len(prompt)] = prompt
        self._own = np.full((len(active), len(self._ids)), np.nan)
        self._path = np.full((len(active), len(self._ids)), np.nan)
        self._observed = evidence_from(prompt) if self._posterior else self._start
        self._sequences = []
        for active_graph in ensemble.active_graphs():
            sequence, known = self._prefixes.sequence(active_graph, vocabulary, prompt, self._observed)
            self._own[list(sequence.members), : known.shape[1]] = known
            self._sequences.append(sequence)
        self._geometric: list[float] = []
        self._drafted = 0
        self._spoken: dict[int, list[NDArray[np.float32]]] = {}
        self._norms: dict[tuple[int, int], float] = {}
        self._mass = np.empty(vocabulary, np.float32)
        self._part = np.empty(vocabulary, np.float32)
        self._massed: tuple[int, set[int]] = (-1, set())
        self.asked = 0

    @property
    def text(self) -> NDArray[np.int64]:
        """int64 [length]."""
        return self._ids[: self.length]

    @property
    def room(self) -> int:
        """Most tokens of a draft that all lie before the weights change."""
        if self._posterior is None:
            return 1 << 30
        return PERIOD - 1 - (self.length - self._start) % PERIOD

    @property
    def nothing_evaluated(self) -> bool:
        """Whether nobody has spoken in this window."""
        return not self._spoken

    @property
    def first_evaluated(self) -> int:
        """The first member of the graph that spoke first in this window."""
        return next(iter(self._spoken))

    @property
    def not_evaluated(self) -> list[int]:
        """The first member of each graph that has not spoken in this window."""
        return [sequence.members[0] for sequence in self._sequences if sequence.members[0] not in self._spoken]

    @property
    def remaining_weight(self) -> float:
        """The weight of members that have not been asked in this window."""
        return float(sum(self.weights[member] for member in self._left()))

    def open(self, draft: Sequence[int]) -> None:
        """Begin a window: behind the text, and behind each of `draft`, of at most `room` tokens."""
        end = self.length + len(draft)
        self._reserve(end + 1)
        self._ids[self.length : end] = draft
        self._drafted, self._massed = len(draft), (-1, set())
        self._spoken, self._norms = {}, {}
        if self._posterior is not None and (self.length - self._start) % PERIOD == 0:
            self.evaluate_all()
            self._posterior.observe(self._own[:, self._observed : self.length])
            self._observed, self.weights = self.length, self._posterior.weights

    def evaluate_next(self) -> None:
        """Let the graph of most weight speak that has not."""
        silent = [sequence for sequence in self._sequences if sequence.members[0] not in self._spoken]
        self._ask(max(silent, key=lambda sequence: sum(self.weights[member] for member in sequence.members)))

    def evaluate_all(self) -> None:
        """Let every graph speak that has not."""
        while self._left():
            self.evaluate_next()

    def evaluate_member(self, member: int) -> None:
        """Let a member speak, if it has not."""
        if member not in self._spoken:
            self._ask(next(sequence for sequence in self._sequences if member in sequence.members))

    def partial_probabilities(self, place: int) -> NDArray[np.float32]:
        """What the members asked so far say of a place of the window, sum_i w_i P_i [vocabulary], which is not the
        whole mixture while some are `rest`. It lies in a buffer that the next call overwrites.
        """
        at, added = self._massed
        if at != place:
            added = set()
            self._mass.fill(0)
        for member in self._spoken.keys() - added:
            self._mass += self._probabilities(member, place, self.weights[member])
        self._massed = place, set(self._spoken)
        return self._mass

    def member_probabilities(self, member: int, place: int) -> NDArray[np.float32]:
        """What one member says, P_i [vocabulary]; in a buffer that the next call overwrites."""
        return self._probabilities(member, place, 1.0)

    def certain_argmax(self, place: int) -> int:
        """The mixture's most probable token at a place; asks as many members as it takes to be certain."""
        if self._ensemble.combine != "linear":
            return int(self.scores(place).argmax())
        while True:
            token, certainty = self.argmax_with_margin(place)
            if certainty > 1:
                return token
            self.evaluate_next()

    def argmax_with_margin(self, place: int) -> tuple[int, float]:
        """The token at a place that is most probable to those asked so far, or to the one of most weight; and by how
        much, in units of what the others could change: it is the mixture's, too, above 1.
        """
        if (forced := self.forced(place)) is not None:
            return forced, math.inf
        if not self._spoken:
            self.evaluate_next()
        mass = self.partial_probabilities(place)
        if self._allow is not None:
            mass = np.where(self._allow(place), mass, np.float32(-1))
        token = int(mass.argmax())
        lead, rest = mass[token], self.remaining_weight
        if not rest:
            return int(self.scores(place).argmax()) if lead < _FAINT else token, math.inf
        mass[token] = -1
        second = mass.max()
        mass[token] = lead
        return token, float(lead - second) / (rest + ROUNDING)

    def forced(self, place: int) -> int | None:
        """The token that is the only one allowed at a place, if there is one."""
        return None if self._allow is None else only_one(self._allow(place))

    def shorten(self, drafted: int) -> None:
        """Take tokens of the draft back: so many of them stay."""
        if drafted < self._drafted:
            self._drafted = drafted
            self._spoken = {member: logits[: drafted + 1] for member, logits in self._spoken.items()}
            for sequence in self._sequences:
                sequence.truncate(self.length + drafted)

    def lengthen(self, tokens: Sequence[int]) -> None:
        """Add tokens to the draft, which stays within `room`; those asked so far say what follows each."""
        begin = self.length + self._drafted
        end = begin + len(tokens)
        self._reserve(end + 1)
        self._ids[begin:end] = tokens
        self._drafted += len(tokens)
        for sequence in self._sequences:
            if sequence.members[0] in self._spoken:
                for member in sequence.members:
                    self._spoken[member] = [_owned(row) for row in self._spoken[member]]
                for chunk in self._listen(sequence, end, begin + 1, verifies=False):
                    for member, rows in zip(sequence.members, chunk.logits, strict=True):
                        self._spoken[member] += [row.copy() for row in rows]

    def scores(self, place: int) -> NDArray[np.float32]:
        """The whole mixture's log-probabilities [vocabulary] at a place, a new array, with -inf where a token is not
        allowed; asks all members.
        """
        self.evaluate_all()
        members = sorted(self._spoken)
        if self._ensemble.combine != "linear":
            mixed = log_linear(np.stack([self._altered(member, place) for member in members]), self.weights[members])
        else:
            with np.errstate(divide="ignore"):
                mixed = np.log(self.partial_probabilities(place))
        check_numbers(mixed[0])
        if self._allow is None:
            return mixed
        mixed = rule_out(mixed, allowed := self._allow(place))
        if self._ensemble.combine == "linear" and mixed.max() < math.log(_FAINT):
            parts = np.stack([log_softmax(self._altered(member, place)) for member in members])
            mixed = rule_out(linear(parts, self.weights[members]), allowed)
        return mixed

    def accept(self, tokens: Sequence[int]) -> None:
        """Lengthen the text by tokens: the draft's first ones, and one that the mixture has chosen behind them."""
        count, begin = len(tokens), self.length
        new: NDArray[np.int64] = np.asarray(tokens, np.int64)
        self._ids[begin : begin + count] = new
        self._path[:, begin : begin + count] = self.weights[:, None]
        for member, logits in self._spoken.items():
            known = [self._norms.get((member, place)) for place in range(count)]
            self._own[member, begin : begin + count] = [
                target_log_probabilities(logits[place][None], new[place, None])[0]
                if norm is None
                else logits[place][token] - norm
                for place, (token, norm) in enumerate(zip(tokens, known, strict=True))
            ]
        if self._ensemble.combine != "linear":
            members = sorted(self._spoken)
            for place, token in enumerate(tokens):
                mixed = log_linear(np.stack([self._spoken[member][place] for member in members]), self.weights[members])
                self._geometric.append(float(mixed[token]))
        self.length += count
        for sequence in self._sequences:
            sequence.truncate(self.length - 1)

    def log_probabilities(self) -> NDArray[np.float64]:
        """Of the tokens behind the prompt, under the mixture without `alter`: float64 [tokens], nats."""
        if self._ensemble.combine != "linear":
            return np.array(self._geometric)
        spoken = self.attribution()
        mixed: NDArray[np.float64] = np.logaddexp.reduce(spoken.own + np.log(spoken.weights), axis=0)
        return mixed

    def attribution(self) -> TokenAttribution:
        """What members gave the tokens behind the prompt; those left out read on for that."""
        for sequence in self._sequences:
            if sequence.read < self.length - 1:
                for chunk in sequence.forward(self._ids[: self.length - 1], max(self._start, sequence.read + 1)):
                    sequence.record(chunk, self.text, self._own)
        new = slice(self._start, self.length)
        return TokenAttribution(self._own[:, new], self._path[:, new])

    def close(self) -> None:
        """Give the caches away."""
        for sequence in self._sequences:
            sequence.truncate(self.length - 1)  # a window that somebody interrupted
            self._prefixes.keep(sequence, self.text, self._own[list(sequence.members), : self.length])
        self._sequences = []

    def _left(self) -> list[int]:
        return [member for sequence in self._sequences for member in sequence.members if member not in self._spoken]

    def _ask(self, sequence: SequenceState) -> None:
        """Let a graph read on to the window's end; note what it says of the text, keep what it says of the window."""
        end = self.length + self._drafted
        first = min(self.length, max(sequence.read + 1, self._observed))
        for member in sequence.members:
            self._spoken[member] = []
        for chunk in self._listen(sequence, end, first):
            sequence.record(chunk, self.text, self._own)
            last = chunk.start + len(chunk.logits[0]) > end
            for member, logits in zip(sequence.members, chunk.logits, strict=True):
                ahead = logits[max(0, self.length - chunk.start) :]
                self._spoken[member] += [*(ahead if last else ahead.copy())]  # the next call overwrites them

    def _listen(self, sequence: SequenceState, end: int, first: int, *, verifies: bool = True) -> Iterator[LogitsChunk]:
        begun, read = time.perf_counter(), end - sequence.read
        yield from sequence.forward(self._ids[:end], first)
        self._called(sequence.members[0], read, time.perf_counter() - begun, verifies)
        self.asked += 1

    def _altered(self, member: int, place: int) -> NDArray[np.float32]:
        logits = self._spoken[member][place]
        return logits if self._alter is None else self._alter(logits, place)

    def _probabilities(self, member: int, place: int, weight: float) -> NDArray[np.float32]:
        """Weight * softmax(logits), in a buffer."""
        logits, part = self._altered(member, place), self._part
        peak = logits.max()
        np.subtract(logits, peak, out=part)
        np.exp(part, out=part)
        total = part.sum()
        check_numbers(total)
        if self._alter is None:
            self._norms[member, place] = float(peak) + math.log(total)
        part *= np.float32(weight) / total
        return part

    def _reserve(self, tokens: int) -> None:
        """Make room for so many tokens."""
        if tokens <= len(self._ids):
            return
        more = 2 * tokens - len(self._ids)
        self._ids = np.pad(self._ids, (0, more))
        self._own, self._path = (
            np.pad(each, ((0, 0), (0, more)), constant_values=np.nan) for each in (self._own, self._path)
        )


def _owned(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of what may lie in a graph's buffer, which its next call overwrites, a copy."""
    return row if row.base is None else row.copy()
