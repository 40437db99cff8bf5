"""Choose each member's format, and its layers at 8 bits, so that the mixture loses least within a budget.

KL divergence is jointly convex: the mixture's loss by quantization is at most the weighted mean of the members',

    KL(sum_i w_i p_i || sum_i w_i q_i) <= sum_i w_i KL(p_i || q_i),

and to second order a member's KL is the sum over its linears. The right side is minimized, under limits on bytes and
seconds: a knapsack with a choice for each group of linears. A price that weighs bytes against seconds orders all steps
by the loss that they save for it; each member's steps follow the lower convex hull of loss over price, so taking them
in that order solves the linear relaxation (Sinha and Zoltners, 1979), and the loss is within one step of the best. The
price at which both limits bind is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import msgspec

from edgemix.errors import InputError
from edgemix.formats import MIXED_BITS, Format

POINTS = 20
"""About the number of points of a curve."""

_HALVINGS = 24
_ROUNDING = 1 + 1e-12
"""Tolerance for sums of seconds in another order."""


class Cost(msgspec.Struct, frozen=True):
    """Bytes, time and loss of a part or a whole.

    Attributes:
        bytes: Bytes on disk.
        seconds: Seconds of decoding a token; 0 if time is not limited.
        loss: Estimated KL from fp32, nats a token.
    """

    bytes: int = 0
    seconds: float = 0.0
    loss: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.seconds + other.seconds, self.loss + other.loss)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.bytes - other.bytes, self.seconds - other.seconds, self.loss - other.loss)


class Group(msgspec.Struct, frozen=True):
    """Linears of one layer that read the same activation. They share their bits, as a graph may join their weights.

    Attributes:
        linears: Names within the model.
        eight_bits: Cost of 8 bits minus that of 4; its loss is negative.
    """

    linears: tuple[str, ...]
    eight_bits: Cost


class MemberCosts(msgspec.Struct, frozen=True):
    """A member's costs in all formats.

    Attributes:
        name: The member's.
        weight: Its share of the mixture. A member of weight 0 takes no time.
        mixed: Its cost with 4 bits in all groups.
        groups: The groups that int4 may store in 8 bits.
        uniform: Costs of the whole member in other formats.
    """

    name: str
    weight: float
    mixed: Cost
    groups: tuple[Group, ...]
    uniform: dict[Format, Cost] = {}


class ResourceBudget(msgspec.Struct, frozen=True):
    """Limits of a bundle; None for no limit.

    Attributes:
        bytes: Bytes of its whole folder.
        seconds: Seconds of decoding a token with its members, at batch 1, on this machine.
    """

    bytes: int | None = None
    seconds: float | None = None


class MemberPlan(msgspec.Struct, frozen=True):
    """A member's chosen format.

    Attributes:
        name: The member's.
        format: The format of its graph.
        eight_bits: Names of the linears that have 8 bits in int4.
        cost: Its own cost, without its weight in the mixture.
    """

    name: str
    format: Format
    eight_bits: tuple[str, ...]
    cost: Cost


class FormatPlan(msgspec.Struct, frozen=True):
    """The members' chosen formats.

    Attributes:
        members: The members, in order.
        cost: The bundle's cost; its loss is the weighted mean of the members'.
        curve: Costs of the best plans, from the smallest (or fastest) to the largest; this plan's cost is among them.
    """

    members: tuple[MemberPlan, ...]
    cost: Cost
    curve: tuple[Cost, ...]


_Limit: TypeAlias = Literal["bytes", "seconds"]
_Price: TypeAlias = Callable[[Cost], float]


def plan_formats(members: Sequence[MemberCosts], budget: ResourceBudget, *, shared: Cost | None = None) -> FormatPlan:
    """Choose the formats with the least loss within a budget.

    Args:
        members: The members' costs.
        budget: At least one limit.
        shared: Cost of the rest of the bundle: tokenizer, manifest, student, members with a format of their own.

    Raises:
        InputError: Nothing is within the budget; the message names the needs of the smallest and the fastest choice.
    """
    shared = shared or Cost()
    alone = [share for share, limit in ((1.0, budget.bytes), (0.0, budget.seconds)) if limit is not None]
    allocations = [_Allocation(members, budget, shared, _price(budget, share)) for share in alone]
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS if len(alone) == 2 else 0):
        middle = (low + high) / 2
        allocations.append(_Allocation(members, budget, shared, _price(budget, middle)))
        low, high = (middle, high) if allocations[-1].blocked == "bytes" else (low, middle)
    fitting = [each for each in allocations if not _exceeded(each.cost, budget)]
    if not fitting:
        raise _too_small(allocations, budget)
    best = min(fitting, key=lambda each: _rank(each.cost))
    chosen = tuple(state.described(member) for member, state in zip(members, best.states, strict=True))
    unlimited = _Allocation(members, ResourceBudget(), shared, best.price)
    return FormatPlan(chosen, best.cost, _curve(unlimited.passed, best.cost))


class _State(msgspec.Struct, frozen=True):
    """How a member is stored.

    Attributes:
        weight_format: The format.
        eight_bits: Indices of the groups at 8 bits, for int4.
        cost: Its cost to the mixture.
    """

    weight_format: Format
    eight_bits: frozenset[int]
    cost: Cost

    def toggled(self, member: MemberCosts, group: int) -> _State:
        """Return the state with the other bits for a group."""
        return _State(self.weight_format, self.eight_bits ^ {group}, self.cost + self.step(member, group))

    def step(self, member: MemberCosts, group: int) -> Cost:
        """Return the additional cost of the other bits for a group."""
        more = _weighed(member, member.groups[group].eight_bits)
        return Cost() - more if group in self.eight_bits else more

    def described(self, member: MemberCosts) -> MemberPlan:
        if self.weight_format != MIXED_BITS:
            return MemberPlan(member.name, self.weight_format, (), member.uniform[self.weight_format])
        groups = [member.groups[index] for index in sorted(self.eight_bits)]
        names = tuple(name for group in groups for name in group.linears)
        return MemberPlan(
            member.name, self.weight_format, names, sum((group.eight_bits for group in groups), member.mixed)
        )


class _Allocation:
    """The best choice at one price.

    Attributes:
        price: The price.
        states: Each member's state.
        cost: The bundle's cost.
        blocked: The limit that was reached first, or None.
        passed: The bundle's cost at the start and after each step.
    """

    def __init__(self, members: Sequence[MemberCosts], budget: ResourceBudget, shared: Cost, price: _Price) -> None:
        self._members, self._budget, self._shared, self.price = members, budget, shared, price
        hulls = [_hull(member, price) for member in members]
        self.states = [hull[0] for hull in hulls]
        self.cost = self._total()
        self.passed = [self.cost]
        self.blocked: _Limit | None = _exceeded(self.cost, budget)
        if self.blocked:
            return
        steps = [
            (-_slope(hull[index - 1].cost, hull[index].cost, price), member, index)
            for member, hull in enumerate(hulls)
            for index in range(1, len(hull))
        ]
        for _, member, index in sorted(steps):
            if self.states[member] is hulls[member][index - 1]:
                self._take(member, hulls[member][index])
        self._fill()

    def _total(self) -> Cost:
        return sum((state.cost for state in self.states), self._shared)

    def _take(self, member: int, state: _State) -> None:
        """Change a member's state if that is within the budget."""
        before, self.states[member] = self.states[member], state
        cost = self._total()
        if limit := _exceeded(cost, self._budget):
            self.states[member] = before
            self.blocked = self.blocked or limit
        else:
            self.cost = cost
            self.passed.append(cost)

    def _fill(self) -> None:
        """Use the rest of the budget for steps that are not on a hull."""
        singles = []
        for member, (costs, state) in enumerate(zip(self._members, self.states, strict=True)):
            for group in range(len(costs.groups) if state.weight_format == MIXED_BITS else 0):
                step = state.step(costs, group)
                if step.loss < 0:
                    singles.append((-_slope(Cost(), step, self.price), member, group))
        for _, member, group in sorted(singles):
            self._take(member, self.states[member].toggled(self._members[member], group))
        for member, costs in enumerate(self._members):
            for whole in _uniform_states(costs):
                if _rank(whole.cost) < _rank(self.states[member].cost):
                    self._take(member, whole)


def _hull(member: MemberCosts, price: _Price) -> list[_State]:
    """Return a member's states on the lower convex hull of loss over price, the cheapest first."""

    def order(cost: Cost) -> tuple[float, float, int]:
        return price(cost), cost.loss, cost.bytes

    cheapest, steps = _State(MIXED_BITS, frozenset(), _weighed(member, member.mixed)), []
    for index in range(len(member.groups)):
        if order(cheapest.step(member, index)) < order(Cost()):
            cheapest = cheapest.toggled(member, index)
        step = cheapest.step(member, index)
        if step.loss < 0:
            steps.append((-_slope(Cost(), step, price), index))
    states = [cheapest]
    for _, index in sorted(steps):
        states.append(states[-1].toggled(member, index))
    hull: list[_State] = []
    for state in sorted([*states, *_uniform_states(member)], key=lambda state: order(state.cost)):
        if hull and state.cost.loss >= hull[-1].cost.loss:
            continue
        while len(hull) > 1 and _slope(hull[-1].cost, state.cost, price) >= _slope(hull[-2].cost, hull[-1].cost, price):
            hull.pop()
        hull.append(state)
    return hull


def _uniform_states(member: MemberCosts) -> list[_State]:
    return [
        _State(weight_format, frozenset(), _weighed(member, cost)) for weight_format, cost in member.uniform.items()
    ]


def _weighed(member: MemberCosts, cost: Cost) -> Cost:
    """Return a member's cost to the mixture."""
    return Cost(cost.bytes, cost.seconds if member.weight > 0 else 0.0, member.weight * cost.loss)


def _rank(cost: Cost) -> tuple[float, int]:
    return cost.loss, cost.bytes


def _price(budget: ResourceBudget, share: float) -> _Price:
    """Return the price of bytes and seconds, in units of their limits with the weights `share` and 1 - `share`."""
    a_byte = share / max(budget.bytes or 1, 1)
    a_second = (1 - share) / (budget.seconds or 1)
    return lambda cost: a_byte * cost.bytes + a_second * cost.seconds


def _slope(before: Cost, after: Cost, price: _Price) -> float:
    """Return the loss saved per price."""
    saved, paid = before.loss - after.loss, price(after) - price(before)
    return saved / paid if paid > 0 else math.copysign(math.inf, saved)


def _exceeded(cost: Cost, budget: ResourceBudget) -> _Limit | None:
    if budget.bytes is not None and cost.bytes > budget.bytes:
        return "bytes"
    return "seconds" if budget.seconds is not None and cost.seconds > budget.seconds * _ROUNDING else None


def _curve(passed: Sequence[Cost], chosen: Cost) -> tuple[Cost, ...]:
    """Return the first, the last and about `POINTS` of the costs between them, and the chosen one."""
    every = math.ceil(len(passed) / POINTS)
    return tuple(sorted({*passed[::every], passed[-1], chosen}, key=lambda cost: (-cost.loss, cost.bytes)))


def _too_small(allocations: Sequence[_Allocation], budget: ResourceBudget) -> InputError:
    """Return the error for a budget that nothing is within."""
    starts = [allocation.passed[0] for allocation in allocations]
    smallest, fastest = min(starts, key=lambda cost: cost.bytes), min(starts, key=lambda cost: cost.seconds)
    remedy = "Prune the members, leave one out, or ship a student of the mixture alone (edgemix distill)."
    size, time = f"{(budget.bytes or 0) / 1e6:,.2f} MB", f"{1000 * (budget.seconds or 0):,.2f} ms a token"
    if budget.bytes is not None and smallest.bytes > budget.bytes:
        least = f"the smallest bundle of this recipe has {smallest.bytes / 1e6:,.2f} MB"
        return InputError(f"a budget of {size} is too small: {least}", remedy)
    if budget.seconds is not None and fastest.seconds > budget.seconds:
        least = f"the fastest mixture of this recipe takes {1000 * fastest.seconds:,.2f} ms here"
        return InputError(f"a budget of {time} is too small: {least}", remedy)
    return InputError(
        f"no bundle of this recipe is within {size} and {time}: the smallest takes {1000 * smallest.seconds:,.2f} ms, "
        f"the fastest has {fastest.bytes / 1e6:,.2f} MB",
        remedy,
    )
