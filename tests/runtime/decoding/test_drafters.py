"""Drafts from the text itself."""

import numpy as np
import pytest

from edgemix.runtime.decoding.cost_model import SpeculationCostModel
from edgemix.runtime.decoding.drafters import PromptLookupDrafter


@pytest.mark.usefixtures("eager")
def test_lookup_copies_what_followed():
    lookup = PromptLookupDrafter(SpeculationCostModel())
    text = np.array([1, 2, 3, 4, 5, 6, 2, 3])
    assert lookup.draft(text, 3).tokens == [4, 5, 6]
    assert lookup.draft(np.array([*text, 9]), 3).tokens == []
    assert lookup.draft(np.array([*text, 9, 4, 5]), 2).tokens == [6, 2]


@pytest.mark.usefixtures("eager")
def test_lookup_takes_the_latest_place_and_the_longest_match():
    lookup = PromptLookupDrafter(SpeculationCostModel())
    assert lookup.draft(np.array([7, 1, 2, 8, 9, 1, 2, 5, 0, 7, 1, 2]), 1).tokens == [8]
    assert PromptLookupDrafter(SpeculationCostModel()).draft(np.array([1, 2, 8, 9, 1, 2, 5, 0, 1, 2]), 1).tokens == [5]


@pytest.mark.usefixtures("eager")
def test_lookup_goes_on_with_what_repeats():
    assert PromptLookupDrafter(SpeculationCostModel()).draft(np.array([1, 2, 1, 2, 1, 2]), 6).tokens == [
        1,
        2,
        1,
        2,
        1,
        2,
    ]


@pytest.mark.usefixtures("eager")
def test_one_token_will_do_for_a_lookup():
    lookup = PromptLookupDrafter(SpeculationCostModel())
    found = lookup.draft(np.array([1, 2, 3, 1]), 2)
    assert found == ([2, 3], [("lookup", 1)] * 2, None)
    assert lookup.draft(np.array([1, 2, 3, 1, 5]), 2).tokens == []


@pytest.mark.usefixtures("eager")
def test_what_is_not_certain_yet_is_not_looked_up():
    """The text may not come to be what a member that writes alone made of it."""
    lookup = PromptLookupDrafter(SpeculationCostModel())
    text = np.array([1, 2, 3, 1, 2])
    assert lookup.draft(np.array([*text, 7, 8, 9]), 2, ahead=3).tokens == []
    assert lookup.draft(np.array([*text, 3, 1]), 2, ahead=2).tokens == [2, 3]
    assert lookup.draft(np.array([*text, 5, 7, 8]), 1).tokens == []


def test_a_lookup_that_fails_leaves_the_place_to_a_shorter_one():
    cost_model = SpeculationCostModel()
    for _ in range(30):
        cost_model.record_decision(("lookup", 3), accepted=False)
        cost_model.record_decision(("lookup", 2), accepted=False)
    text = np.array([1, 2, 3, 4, 5, 1, 2, 3])
    assert PromptLookupDrafter(cost_model).draft(text, 2) == ([4], [("lookup", 1)], None)
