"""The cost model of speculative decoding: whether drafting and verifying one more token is worth its cost.

A token that is accepted with probability p saves p times the seconds that a token takes now; it costs the seconds of
its drafting and of its position in the verifying call. All of these are measured while text is generated, as averages
that fade.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FADE = 0.9
"""Weight that an average keeps when a new observation comes."""
_PRIOR = 0.7
"""Acceptance probability of a source before anything is known of it; `_PRIORS` of some that are likely to be worse."""
_PRIORS: dict[object, float] = {
    **{("lookup", length): prior for length, prior in ((1, 0.35), (2, 0.5), (3, 0.6))},
    **{("n-gram", quarter): prior for quarter, prior in enumerate((0.15, 0.3, 0.5))},
    **{("student", quarter): prior for quarter, prior in ((0, 0.3), (1, 0.5))},
    **{("alone", quarter): prior for quarter, prior in enumerate((0.6, 0.75, 0.8, 0.85, 0.95))},
    "student": 0.5,
}
_MIN_PROBABILITY = 0.3
"""Least acceptance probability of a token that is drafted before any call has been timed."""
_PRIOR_PULL = 0.02
"""How far an estimate returns to its prior at each step that does not try its source."""
_PRIOR_REQUESTS = 2.0
"""How many requests of a drafter the prior of its saving counts as much as."""
_PRIOR_SLOPE = 0.1
"""Cost of one more token in a call, in units of a call, before it is measured."""
_PRIOR_SLOPE_WEIGHT = 0.1
"""Weight of that prior, against the variance of the numbers of tokens seen."""
_MAX_TOKENS = 32
"""Largest call that is taken into account: a token of a larger one costs less, and tells nothing of small ones."""
_UNCERTAINTY_PRIORS = {False: 0.1, True: 0.3}
"""Share of positions at which a member that decodes alone may be wrong: after a certain and after an uncertain one."""


class _FadingMean:
    """A mean in which old observations fade; it begins as `weight` observations of `value`."""

    def __init__(self, value: float, weight: float = 1.0) -> None:
        self._sum, self._weight = value * weight, weight

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum, self._weight = _FADE * self._sum + value * weight, _FADE * self._weight + weight

    def move(self, share: float, towards: float) -> None:
        self._sum += share * (towards * self._weight - self._sum)


class _CallTimes:
    """A line fitted to the seconds of a graph's calls by their number of tokens; old calls fade.

    Attributes:
        verifying: Calls in this step that verified a draft.
        verifying_per_step: Their faded sum over steps.
    """

    def __init__(self) -> None:
        self._count = self._x = self._y = self._xx = self._xy = 0.0
        self.verifying = self.verifying_per_step = 0.0

    @property
    def seconds_per_extra_token(self) -> float:
        """Slope of the line; the prior counts until calls of different sizes have been seen."""
        x, y = self._x / self._count, self._y / self._count
        variance, covariance = self._xx / self._count - x * x, self._xy / self._count - x * y
        expected = _PRIOR_SLOPE * y / (1 + _PRIOR_SLOPE * (x - 1))
        return max(0.0, (covariance + _PRIOR_SLOPE_WEIGHT * expected) / (variance + _PRIOR_SLOPE_WEIGHT))

    @property
    def seconds(self) -> float:
        """Seconds of a call of one token."""
        return max(0.0, (self._y - self.seconds_per_extra_token * (self._x - self._count)) / self._count)

    def decay(self, share: float) -> None:
        """Return by a share to a cost of zero."""
        self._y, self._xy = (1 - share) * self._y, (1 - share) * self._xy

    def add(self, tokens: int, seconds: float) -> None:
        self._count, self._x, self._y = _FADE * self._count + 1, _FADE * self._x + tokens, _FADE * self._y + seconds
        self._xx, self._xy = _FADE * self._xx + tokens * tokens, _FADE * self._xy + tokens * seconds


class _DraftRequests:
    """What requests of a drafter cost and yielded; old requests fade."""

    def __init__(self) -> None:
        self.count = self.seconds = self.drafted = self.accepted = 0.0

    def decay(self, share: float) -> None:
        """Forget a share of all."""
        self.count, self.seconds = (1 - share) * self.count, (1 - share) * self.seconds
        self.drafted, self.accepted = (1 - share) * self.drafted, (1 - share) * self.accepted


class SpeculationCostModel:
    """What steps and calls have taken so far, and how many drafted tokens were accepted.

    A *source* names what drafted a token and how certain it was, such as ("lookup", 3); its first part alone names the
    drafter.
    """

    def __init__(self) -> None:
        self._steps = self._step_seconds = self._step_tokens = 0.0
        self._calls: dict[object, _CallTimes] = {}
        self._single_graph: int | None = None
        self._uncertainty = {previous: _FadingMean(share, 2.0) for previous, share in _UNCERTAINTY_PRIORS.items()}
        self._uncertain = False
        self._accepted: dict[object, _FadingMean] = {}
        self._drafting: dict[object, _FadingMean] = {}
        self._requests: dict[object, _DraftRequests] = {}
        self._tried: set[object] = set()

    @property
    def seconds_per_token(self) -> float:
        """Average seconds of a generated token; 0 before any is known."""
        if self._single_graph is not None:
            return self._calls[self._single_graph].seconds
        return self._step_seconds / self._step_tokens if self._step_tokens else 0.0

    @property
    def seconds_per_extra_token(self) -> float:
        """Seconds by which a step takes longer for each further token that it verifies."""
        if self._single_graph is not None:
            return self._calls[self._single_graph].seconds_per_extra_token
        if not self._steps:
            return 0.0
        extra = (calls.seconds_per_extra_token * calls.verifying_per_step for calls in self._calls.values())
        return sum(extra) / self._steps

    @contextmanager
    def single_graph(self, graph: int) -> Iterator[None]:
        """Within this context, count costs and savings in calls of one graph, which decodes alone."""
        self._single_graph = graph if graph in self._calls else None
        try:
            yield
        finally:
            self._single_graph = None

    def acceptance_probability(self, source: object) -> float:
        """Return the probability that a token of a source is accepted, given that those before it are."""
        return self._accepted[source].value if source in self._accepted else _PRIORS.get(source, _PRIOR)

    def drafting_seconds(self, source: object) -> float:
        """Return the seconds that a token of a source, or a graph's call of one token, takes; 0 if unknown."""
        if source in self._calls:
            return self._calls[source].seconds
        return self._drafting[source].value if source in self._drafting else 0.0

    def extra_token_seconds(self, graph: object) -> float:
        """Return the seconds by which a graph's call takes longer for each further token; 0 if unknown."""
        return self._calls[graph].seconds_per_extra_token if graph in self._calls else 0.0

    def worth_drafting(self, probability: float, seconds: float = 0.0) -> bool:
        """Return whether one more token of a draft saves time.

        Args:
            probability: That it is accepted.
            seconds: That drafting it takes.
        """
        if not self.seconds_per_token:
            return probability > _MIN_PROBABILITY
        return probability * self.seconds_per_token > seconds + self.seconds_per_extra_token

    def plan_draft(self, probability: float, most: int, seconds: float = 0.0) -> tuple[int, float]:
        """Return how many tokens to draft, at most `most`, and the seconds that this is expected to save.

        Args:
            probability: That each is accepted, given that those before it are.
            most: Most tokens.
            seconds: That drafting each takes.
        """
        count, saved = 0, 0.0
        while count < most and self.worth_drafting(accepted := probability ** (count + 1), seconds):
            gain = accepted * (self.seconds_per_token or 1.0)
            count, saved = count + 1, saved + gain - seconds - self.seconds_per_extra_token
        return count, saved

    def saving(self, sources: Iterable[object]) -> float:
        """Return the seconds that verifying drafted tokens, whose sources are given in order, is expected to save."""
        probability, saved = 1.0, 0.0
        for source in sources:
            probability *= self.acceptance_probability(source)
            saved += probability * (self.seconds_per_token or 1.0) - self.seconds_per_extra_token
        return saved

    def expected_saving(self, drafter: object, most: int) -> float:
        """Return the seconds that requesting at most `most` tokens from a drafter is expected to save: by what earlier
        requests yielded, and by the prior as long as there were few.
        """
        _, saved = self.plan_draft(_PRIORS.get(drafter, _PRIOR), most, self.drafting_seconds(drafter))
        if (requests := self._requests.get(drafter)) is None:
            return saved
        gained = requests.accepted * (self.seconds_per_token or 1.0)
        gained -= requests.seconds + requests.drafted * self.seconds_per_extra_token
        return (_PRIOR_REQUESTS * saved + gained) / (_PRIOR_REQUESTS + requests.count)

    def record_request(self, drafter: object, calls: int, drafted: int) -> None:
        """Record that a drafter was requested, the calls that it took, and the tokens that it drafted."""
        requests = self._requests.setdefault(drafter, _DraftRequests())
        requests.decay(1 - _FADE)
        requests.count, requests.drafted = requests.count + 1, requests.drafted + drafted
        requests.seconds += calls * self.drafting_seconds(drafter)

    def defer_verification(self, probability: float, graph: int, others: Iterable[int]) -> bool:
        """Return whether a graph that decodes alone should draft one more token before the others verify.

        One call of the others serves both tokens if the next one is uncertain, too; if the graph is wrong already, its
        next call is wasted.

        Args:
            probability: That all its tokens so far are accepted.
            graph: The graph that decodes alone.
            others: The graphs that verify.
        """
        one = self.drafting_seconds(graph)
        verification = sum(self.drafting_seconds(other) or one for other in others)
        uncertainty = self._uncertainty[self._uncertain].value
        return probability * uncertainty * verification > (1 - probability) * (self.drafting_seconds("alone") or one)

    def record_uncertainty(self, uncertain: bool) -> None:
        """Record whether the next token of a graph that decodes alone could change if the others were evaluated.

        Uncertain positions come in groups, so the previous position tells how likely the next one is.
        """
        self._uncertainty[self._uncertain].add(float(uncertain))
        self._uncertain = uncertain

    def record_call(self, graph: object, tokens: int, seconds: float, *, verifies: bool = True) -> None:
        """Record a graph's call.

        Args:
            graph: The graph.
            tokens: That it read.
            seconds: That it took.
            verifies: Whether it verified a draft; else it drafted, or decoded alone.
        """
        if tokens <= _MAX_TOKENS:
            self._tried.add(graph)
            calls = self._calls.setdefault(graph, _CallTimes())
            calls.verifying += verifies
            calls.add(tokens, seconds)

    def record_step(self, seconds: float, tokens: int) -> None:
        """Record a step: its seconds in all, and the tokens that it generated."""
        self._steps = _FADE * self._steps + 1
        self._step_seconds = _FADE * self._step_seconds + seconds
        self._step_tokens = _FADE * self._step_tokens + tokens
        for graph, calls in self._calls.items():
            calls.verifying_per_step, calls.verifying = _FADE * calls.verifying_per_step + calls.verifying, 0.0
            if not calls.verifying_per_step and graph not in self._tried:  # it only drafts
                calls.decay(_PRIOR_PULL)
        for source, mean in self._accepted.items():
            if source not in self._tried:
                mean.move(_PRIOR_PULL, _PRIORS.get(source, _PRIOR))
        for source, mean in self._drafting.items():
            if source not in self._tried:
                mean.move(_PRIOR_PULL, 0.0)
        for drafter, requests in self._requests.items():
            if drafter not in self._tried:
                requests.decay(_PRIOR_PULL)
        self._tried.clear()

    def record_decision(self, source: tuple[str, int], accepted: bool) -> None:
        """Record whether a drafted token was accepted."""
        for name in (source, source[0]):
            self._accepted.setdefault(name, _FadingMean(self.acceptance_probability(name), 2.0)).add(float(accepted))
            self._tried.add(name)
        if accepted and (requests := self._requests.get(source[0])) is not None:
            requests.accepted += 1

    def record_drafting(self, source: object, seconds: float, tokens: int = 1) -> None:
        """Record the seconds that drafting tokens of a source took."""
        self._drafting.setdefault(source, _FadingMean(seconds / tokens)).add(seconds / tokens, tokens)
        self._tried.add(source)
