"""When another drafted token pays: what it costs to draft and to verify, against what it is likely to save.

A token that will be accepted with probability p saves p times what a token takes now; it costs its drafting and its
place in the verifying call. Both are measured while text is written, with memories that fade.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FADE = 0.9
_HOPE = 0.7
"""Acceptance of a source that nothing is known of; `_HOPES` of some that are likely to be worse."""
_HOPES: dict[object, float] = {
    **{("lookup", length): hope for length, hope in ((1, 0.35), (2, 0.5), (3, 0.6))},
    **{("n-gram", quarter): hope for quarter, hope in enumerate((0.15, 0.3, 0.5))},
    **{("student", quarter): hope for quarter, hope in ((0, 0.3), (1, 0.5))},
    **{("alone", quarter): hope for quarter, hope in enumerate((0.6, 0.75, 0.8, 0.85, 0.95))},
    "student": 0.5,
}
_WORTH = 0.3
"""Least chance of a token that is drafted while nobody knows what anything takes."""
_RETURN = 0.02
"""How far what is believed of a source returns to hope at each step that does not try it."""
_TRIALS = 2.0
"""Times that a drafter is asked until what came of it counts as much as what was hoped for."""
_SLOPE = 0.1
"""A further token in a call, in units of a call, before that is measured."""
_DOUBT = 0.1
"""How much weight that guess has, against the variance of the numbers of tokens seen."""
_FEW = 32
"""Tokens of a call that tell what one of few costs; of many, they cost less."""
_DOUBTS = {False: 0.1, True: 0.3}
"""Share of places where a member that writes alone may be wrong, before any is seen: behind certain ones and others."""


class _Mean:
    """A mean that forgets: of `value`, `weight` observations' worth."""

    def __init__(self, value: float, weight: float = 1.0) -> None:
        self._sum, self._weight = value * weight, weight

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum, self._weight = _FADE * self._sum + value * weight, _FADE * self._weight + weight

    def move(self, share: float, towards: float) -> None:
        self._sum += share * (towards * self._weight - self._sum)


class _Calls:
    """What calls of one graph take, a line through those of few tokens; newer ones count more."""

    def __init__(self) -> None:
        self._count = self._x = self._y = self._xx = self._xy = 0.0
        self.now = self.share = 0.0
        """Calls in this step that verified, and their faded sum over steps."""

    @property
    def further(self) -> float:
        """Seconds for each token more; as if the slope that is expected had been seen, too, until one shows."""
        x, y = self._x / self._count, self._y / self._count
        variance, covariance = self._xx / self._count - x * x, self._xy / self._count - x * y
        expected = _SLOPE * y / (1 + _SLOPE * (x - 1))
        return max(0.0, (covariance + _DOUBT * expected) / (variance + _DOUBT))

    @property
    def seconds(self) -> float:
        """Of one token."""
        return max(0.0, (self._y - self.further * (self._x - self._count)) / self._count)

    def move(self, share: float) -> None:
        """Return by a share to costing nothing."""
        self._y, self._xy = (1 - share) * self._y, (1 - share) * self._xy

    def add(self, tokens: int, seconds: float) -> None:
        self._count, self._x, self._y = _FADE * self._count + 1, _FADE * self._x + tokens, _FADE * self._y + seconds
        self._xx, self._xy = _FADE * self._xx + tokens * tokens, _FADE * self._xy + tokens * seconds


class _Asks:
    """What came of asking a drafter; newer times count more."""

    def __init__(self) -> None:
        self.times = self.spent = self.drafted = self.accepted = 0.0

    def fade(self, share: float) -> None:
        """Forget a share of it."""
        self.times, self.spent = (1 - share) * self.times, (1 - share) * self.spent
        self.drafted, self.accepted = (1 - share) * self.drafted, (1 - share) * self.accepted


class SpeculationCostModel:
    """What steps and calls have taken so far, and how drafts have fared.

    Attributes:
        seconds: Of a token, on average.
        further: Seconds that a step takes longer for each token that it verifies more.
    """

    def __init__(self) -> None:
        self._steps = self._spent = self._gained = 0.0
        self._calls: dict[object, _Calls] = {}
        self._writer: int | None = None
        self._doubts = {behind: _Mean(share, 2.0) for behind, share in _DOUBTS.items()}
        self._doubtful = False
        self._accepted: dict[object, _Mean] = {}
        self._drafting: dict[object, _Mean] = {}
        self._asks: dict[object, _Asks] = {}
        self._tried: set[object] = set()

    @property
    def seconds(self) -> float:
        if self._writer is not None:
            return self._calls[self._writer].seconds
        return self._spent / self._gained if self._gained else 0.0

    @property
    def further(self) -> float:
        if self._writer is not None:
            return self._calls[self._writer].further
        return sum(calls.further * calls.share for calls in self._calls.values()) / self._steps if self._steps else 0.0

    @contextmanager
    def alone(self, graph: int) -> Iterator[None]:
        """Within, a token is one graph's, and what drafts cost and save is counted in its calls."""
        self._writer = graph if graph in self._calls else None
        try:
            yield
        finally:
            self._writer = None

    def acceptance_probability(self, source: object) -> float:
        """Of a token of that source to be accepted, where the ones before it are."""
        return self._accepted[source].value if source in self._accepted else _HOPES.get(source, _HOPE)

    def drafting(self, source: object) -> float:
        """Seconds that a token of that source takes; of a graph, in a call of its own. 0 while nothing is known."""
        if source in self._calls:
            return self._calls[source].seconds
        return self._drafting[source].value if source in self._drafting else 0.0

    def reading(self, graph: object) -> float:
        """Seconds that a call of a graph takes longer for each token that it reads more."""
        return self._calls[graph].further if graph in self._calls else 0.0

    def worth_drafting(self, chance: float, seconds: float = 0.0) -> bool:
        """Whether a further token of a draft does, that takes so long to draft and will be accepted so likely."""
        return chance * self.seconds > seconds + self.further if self.seconds else chance > _WORTH

    def plan(self, chance: float, most: int, seconds: float = 0.0) -> tuple[int, float]:
        """How many tokens to draft, each accepted so likely where those before it are, and the seconds that saves."""
        count, saved = 0, 0.0
        while count < most and self.worth_drafting(likely := chance ** (count + 1), seconds):
            count, saved = count + 1, saved + likely * (self.seconds or 1.0) - seconds - self.further
        return count, saved

    def saving(self, sources: Iterable[object]) -> float:
        """Seconds that drafted tokens of those sources, one after the other, are likely to save in a verifying call."""
        chance, saved = 1.0, 0.0
        for source in sources:
            chance *= self.acceptance_probability(source)
            saved += chance * (self.seconds or 1.0) - self.further
        return saved

    def expected_saving(self, drafter: object, most: int) -> float:
        """Seconds that asking a drafter for at most so many tokens is likely to save: by what came of it before, and
        as long as that was seldom, by hope.
        """
        _, saved = self.plan(_HOPES.get(drafter, _HOPE), most, self.drafting(drafter))
        if (asks := self._asks.get(drafter)) is None:
            return saved
        gained = asks.accepted * (self.seconds or 1.0) - asks.spent - asks.drafted * self.further
        return (_TRIALS * saved + gained) / (_TRIALS + asks.times)

    def record_request(self, drafter: object, calls: int, drafted: int) -> None:
        """Hear that a drafter was asked, how many calls it took, and how many tokens came of it."""
        asks = self._asks.setdefault(drafter, _Asks())
        asks.fade(1 - _FADE)
        asks.times, asks.drafted = asks.times + 1, asks.drafted + drafted
        asks.spent += calls * self.drafting(drafter)

    def defer_verification(self, chance: float, writer: int, others: Iterable[int]) -> bool:
        """Whether a member that writes alone, and is right so far with that chance, does well to write another token
        before the others are asked. One call of theirs will do for both if the next token is doubtful, too; if it has
        been wrong already, its own is for nothing.
        """
        one = self.drafting(writer)
        theirs = sum(self.drafting(graph) or one for graph in others)
        return chance * self._doubts[self._doubtful].value * theirs > (1 - chance) * (self.drafting("alone") or one)

    def record_uncertainty(self, doubtful: bool) -> None:
        """Hear of the next place whether the token that one member writes alone could be another one if others were
        asked. Doubts come in groups: the place before tells how likely they are.
        """
        self._doubts[self._doubtful].add(float(doubtful))
        self._doubtful = doubtful

    def record_call(self, graph: object, tokens: int, seconds: float, *, verifies: bool = True) -> None:
        """Hear of a graph's call that read so many tokens, to verify them, to write alone or to draft."""
        if tokens <= _FEW:
            self._tried.add(graph)
            calls = self._calls.setdefault(graph, _Calls())
            calls.now += verifies
            calls.add(tokens, seconds)

    def record_step(self, seconds: float, tokens: int) -> None:
        """Hear of a step: seconds in all, tokens written."""
        self._steps = _FADE * self._steps + 1
        self._spent, self._gained = _FADE * self._spent + seconds, _FADE * self._gained + tokens
        for graph, calls in self._calls.items():
            calls.share, calls.now = _FADE * calls.share + calls.now, 0.0
            if not calls.share and graph not in self._tried:  # it drafts only
                calls.move(_RETURN)
        for source, mean in self._accepted.items():
            if source not in self._tried:
                mean.move(_RETURN, _HOPES.get(source, _HOPE))
        for source, mean in self._drafting.items():
            if source not in self._tried:
                mean.move(_RETURN, 0.0)
        for drafter, asks in self._asks.items():
            if drafter not in self._tried:
                asks.fade(_RETURN)
        self._tried.clear()

    def record_decision(self, source: tuple[str, int], accepted: bool) -> None:
        """Hear of a drafted token that came to a decision."""
        for name in (source, source[0]):
            self._accepted.setdefault(name, _Mean(self.acceptance_probability(name), 2.0)).add(float(accepted))
            self._tried.add(name)
        if accepted and (asks := self._asks.get(source[0])) is not None:
            asks.accepted += 1

    def record_drafting(self, source: object, seconds: float, tokens: int = 1) -> None:
        """Hear how long tokens took to draft."""
        self._drafting.setdefault(source, _Mean(seconds / tokens)).add(seconds / tokens, tokens)
        self._tried.add(source)
