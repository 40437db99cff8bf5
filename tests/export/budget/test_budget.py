"""Choosing formats within a budget: against all choices where they can be counted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgemix.errors import InputError
from edgemix.export.budget.plan import Cost, FormatPlan, Group, MemberCosts, ResourceBudget, plan_formats


def members(seed: int, *, count: int = 2, groups: int = 4, eager: float = 1.0) -> list[MemberCosts]:
    """Members whose groups have random costs, time nearly by size; `eager` is the time of 8 bits by their size."""
    generator = np.random.default_rng(seed)
    found = []
    for index, weight in enumerate(generator.dirichlet(np.ones(count))):
        int4, parts = Cost(500, 0.004), []
        for group in range(groups):
            size, loss = int(generator.integers(100, 1000)), float(generator.exponential(0.1))
            rates = generator.uniform(0.8, 1.2, 2) * (1, eager) * 1e-5
            four, eight = Cost(size, size * rates[0], loss), Cost(2 * size, 2 * size * rates[1], loss / 100)
            int4 += four
            parts.append(Group((f"{group}.a", f"{group}.b"), eight - four))
        eight = sum((group.eight_bits for group in parts), int4)
        uniform = {
            "int8": Cost(eight.bytes - 30, eight.seconds, eight.loss),
            "fp16": Cost(2 * eight.bytes, 2 * eight.seconds, 0.0),
        }
        found.append(MemberCosts(f"m{index}", float(weight), int4, tuple(parts), uniform))
    return found


def weighed(member: MemberCosts, cost: Cost) -> Cost:
    return Cost(cost.bytes, cost.seconds if member.weight else 0.0, member.weight * cost.loss)


def every_cost(mixture: list[MemberCosts], shared: Cost) -> list[Cost]:
    """The cost of each combination of the members' formats."""
    options = []
    for member in mixture:
        choices = itertools.product(*((Cost(), group.eight_bits) for group in member.groups))
        options.append([weighed(member, sum(each, member.mixed)) for each in choices])
        options[-1] += [weighed(member, cost) for cost in member.uniform.values()]
    return [sum(each, shared) for each in itertools.product(*options)]


def largest_step(mixture: list[MemberCosts]) -> float:
    return max(
        member.weight * max(*(-group.eight_bits.loss for group in member.groups), member.uniform["int8"].loss)
        for member in mixture
    )


def cost_of(found: FormatPlan, mixture: list[MemberCosts], shared: Cost) -> Cost:
    """The cost of a plan, computed from its members."""
    parts = []
    for chosen, member in zip(found.members, mixture, strict=True):
        assert chosen.name == member.name
        if chosen.format == "int4":
            eight = set(chosen.eight_bits)
            assert all(len(eight & set(group.linears)) in (0, len(group.linears)) for group in member.groups)
            own = sum((group.eight_bits for group in member.groups if group.linears[0] in eight), member.mixed)
        else:
            own = member.uniform[chosen.format]
        assert close(own, chosen.cost)
        parts.append(weighed(member, own))
    return sum(parts, shared)


def close(one: Cost, other: Cost) -> bool:
    return one.bytes == other.bytes and np.allclose((one.seconds, one.loss), (other.seconds, other.loss), atol=1e-12)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limits", ["bytes", "seconds", "both"])
def test_close_to_the_best_of_all_and_never_over(seed: int, limits: str) -> None:
    mixture, shared = members(seed), Cost(777)
    costs = every_cost(mixture, shared)
    low, high = min(cost.bytes for cost in costs), max(cost.bytes for cost in costs)
    fast, slow = min(cost.seconds for cost in costs), max(cost.seconds for cost in costs)
    for share in (0.0, 0.05, 0.2, 0.4, 0.7, 1.0):
        budget = ResourceBudget(
            int(low + share * (high - low)) if limits != "seconds" else None,
            fast + (0.1 + 0.9 * share) * (slow - fast) if limits != "bytes" else None,
        )
        found = plan_formats(mixture, budget, shared=shared)
        assert close(found.cost, cost_of(found, mixture, shared))
        assert budget.bytes is None or found.cost.bytes <= budget.bytes
        assert budget.seconds is None or found.cost.seconds <= budget.seconds * (1 + 1e-9)
        fitting = [
            cost.loss
            for cost in costs
            if (budget.bytes is None or cost.bytes <= budget.bytes)
            and (budget.seconds is None or cost.seconds <= budget.seconds)
        ]
        assert min(fitting) - 1e-12 <= found.cost.loss <= min(fitting) + largest_step(mixture)


def test_all_but_the_last_step_is_used() -> None:
    """Where single steps are small, what is lost is nearly the best that there is."""
    mixture = members(0, count=3, groups=40)
    start, end = plan_formats(mixture, ResourceBudget(10**9)).curve[
        :: len(plan_formats(mixture, ResourceBudget(10**9)).curve) - 1
    ]
    for share in (0.05, 0.15, 0.3):
        limit = int(start.bytes + share * (end.bytes - start.bytes))
        found = plan_formats(mixture, ResourceBudget(limit))
        assert limit - 1000 < found.cost.bytes <= limit
        both = plan_formats(mixture, ResourceBudget(limit, found.cost.seconds))
        assert both.cost.loss <= found.cost.loss + 1e-12
        tighter = plan_formats(mixture, ResourceBudget(limit, 0.97 * found.cost.seconds))
        assert found.cost.loss < tighter.cost.loss < 1.3 * found.cost.loss


def test_more_room_loses_less() -> None:
    mixture = members(3, groups=8)
    smallest = plan_formats(mixture, ResourceBudget(10**9)).curve[0].bytes
    losses = [plan_formats(mixture, ResourceBudget(int(smallest * share))).cost.loss for share in np.linspace(1, 4, 30)]
    assert losses[0] > losses[-1] == 0
    assert sum(after > before for before, after in itertools.pairwise(losses)) <= 2  # a step that fits no more


def test_the_curve_is_convex_and_holds_the_choice() -> None:
    mixture = members(5, groups=30)
    found = plan_formats(mixture, ResourceBudget(40_000), shared=Cost(100))
    assert found.cost in found.curve
    assert 15 <= len(found.curve) <= 22
    assert [cost.bytes for cost in found.curve] == sorted(cost.bytes for cost in found.curve)
    assert found.curve[0].bytes == 100 + sum(member.mixed.bytes for member in mixture)
    assert found.curve[-1].loss == pytest.approx(0, abs=1e-12)
    whole = plan_formats(mixture, ResourceBudget(10**9)).curve
    slopes = [(b.loss - a.loss) / (b.bytes - a.bytes) for a, b in itertools.pairwise(whole)]
    assert slopes == sorted(slopes)
    by_time = plan_formats(mixture, ResourceBudget(seconds=0.5)).curve
    assert [cost.seconds for cost in by_time] == sorted(cost.seconds for cost in by_time)


def test_weights_decide_where_bits_go() -> None:
    one = members(1, count=1, groups=6)[0]
    heavy, light, absent = (
        MemberCosts(name, weight, one.mixed, one.groups, one.uniform)
        for name, weight in (("heavy", 0.8), ("light", 0.2), ("absent", 0.0))
    )
    mixture = [light, absent, heavy]
    for limit in range(plan_formats(mixture, ResourceBudget(10**9)).curve[0].bytes, 60_000, 997):
        costs = {member.name: member.cost for member in plan_formats(mixture, ResourceBudget(limit)).members}
        assert costs["heavy"].loss <= costs["light"].loss <= costs["absent"].loss
        assert costs["absent"] == one.mixed


def test_a_member_that_weighs_nothing_takes_no_time() -> None:
    one = members(1, count=1)[0]
    none = MemberCosts("none", 0.0, one.mixed, one.groups, one.uniform)
    assert plan_formats([one, none], ResourceBudget(10**9)).cost.seconds == pytest.approx(
        plan_formats([one], ResourceBudget(10**9)).cost.seconds
    )


def test_eight_bits_may_be_the_faster_ones() -> None:
    mixture = members(2, eager=0.3)
    found = plan_formats(
        mixture, ResourceBudget(seconds=min(cost.seconds for cost in every_cost(mixture, Cost())) * 1.001)
    )
    assert all(member.format != "int4" or len(member.eight_bits) == 8 for member in found.members)


def test_the_int8_format_takes_the_place_of_int4_with_all_at_eight_bits() -> None:
    mixture = members(4)
    formats = {
        member.format
        for limit in range(plan_formats(mixture, ResourceBudget(10**9)).curve[0].bytes, 30_000, 101)
        for member in plan_formats(mixture, ResourceBudget(limit)).members
        if member.format != "int4" or len(member.eight_bits) == 8
    }
    assert formats == {"int8", "fp16"}


def test_a_budget_that_nothing_meets_is_refused() -> None:
    mixture = members(0)
    costs = every_cost(mixture, Cost())
    smallest, fastest = min(cost.bytes for cost in costs), min(cost.seconds for cost in costs)
    assert plan_formats(mixture, ResourceBudget(smallest, fastest)).cost.bytes == smallest
    with pytest.raises(InputError, match=r"a budget of 0\.00 MB is too small: the smallest .* has 0\.01 MB\nPrune"):
        plan_formats(mixture, ResourceBudget(smallest // 10))
    message = rf"a budget of {990 * fastest:.2f} ms a token is too small: .* takes {1000 * fastest:.2f} ms here"
    with pytest.raises(InputError, match=message):
        plan_formats(mixture, ResourceBudget(10**9, 0.99 * fastest))


def test_limits_that_exclude_each_other_are_refused() -> None:
    mixture = members(2, eager=0.3)
    costs = every_cost(mixture, Cost())
    budget = ResourceBudget(min(cost.bytes for cost in costs), min(cost.seconds for cost in costs) * 1.01)
    with pytest.raises(InputError, match=r"no bundle of this recipe is within .* MB and .* ms a token: the smallest"):
        plan_formats(mixture, budget)
