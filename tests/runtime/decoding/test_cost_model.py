"""When another drafted token pays, from what calls took and how drafts fared."""

import pytest

from edgemix.runtime.decoding.cost_model import SpeculationCostModel


def test_the_pace_finds_what_a_token_costs():
    cost_model = SpeculationCostModel()
    for drafted in [0, 3, 1, 5, 2, 0, 4] * 5:
        seconds = 0.010 + 0.001 * drafted
        cost_model.record_call(0, 1 + drafted, seconds)
        cost_model.record_step(seconds, 1)
    assert cost_model.seconds_per_extra_token == pytest.approx(0.001, rel=0.15)
    cost_model.record_call(0, 400, 0.2)  # a prompt's token takes less, and tells nothing of one of few
    assert cost_model.seconds_per_extra_token == pytest.approx(0.001, rel=0.15)
    assert cost_model.worth_drafting(0.2)
    assert not cost_model.worth_drafting(0.02)
    assert not cost_model.worth_drafting(0.5, seconds=0.020)


def test_the_pace_learns_who_is_right():
    cost_model = SpeculationCostModel()
    for _ in range(30):
        cost_model.record_decision(("lookup", 2), accepted=False)
        cost_model.record_decision(("student", 3), accepted=True)
    assert cost_model.acceptance_probability(("lookup", 2)) < 0.1
    assert cost_model.acceptance_probability(("student", 3)) > 0.95
    for _ in range(200):  # and tries again some day
        cost_model.record_step(0.01, 1)
    assert cost_model.acceptance_probability(("lookup", 2)) > 0.45
    assert cost_model.acceptance_probability(("student", 3)) < 0.75


def test_what_two_members_read_costs_both():
    """However different they are, and whoever of them reads more at once."""
    cost_model = SpeculationCostModel()
    for _ in range(10):
        for tokens in (1, 2, 1, 3):
            cost_model.record_call(0, tokens, 0.040 + 0.004 * tokens, verifies=tokens == 1)
        for tokens in (5, 7):
            cost_model.record_call(1, tokens, 0.008 + 0.001 * tokens)
        cost_model.record_step(0.2, 5)
    assert cost_model.seconds_per_extra_token == pytest.approx(2 * 0.004 + 2 * 0.001, rel=0.1)
    with cost_model.single_graph(0):
        assert cost_model.seconds_per_extra_token == pytest.approx(0.004, rel=0.1)
        assert cost_model.seconds_per_token == pytest.approx(0.044, rel=0.1)
    assert cost_model.seconds_per_token == pytest.approx(0.04)


def test_a_draft_is_as_long_as_pays():
    cost_model = SpeculationCostModel()
    for tokens in [1, 4, 2, 6, 3] * 5:
        cost_model.record_call(0, tokens, 0.009 + 0.001 * tokens)
        cost_model.record_step(0.010, 1)
    count, saved = cost_model.plan_draft(0.5, 15)
    assert count == 3
    assert saved == pytest.approx(0.00875 - 3 * cost_model.seconds_per_extra_token, rel=0.1)
    assert cost_model.plan_draft(0.5, 2)[0] == 2
    assert cost_model.plan_draft(0.5, 15, 0.006) == (0, 0.0)


def test_what_took_long_once_is_tried_again():
    cost_model = SpeculationCostModel()
    cost_model.record_drafting("alone", 0.05)
    before = cost_model.drafting_seconds("alone")
    for _ in range(100):
        cost_model.record_step(0.01, 1)
    assert before == 0.05
    assert cost_model.drafting_seconds("alone") < 0.01


def test_drafting_is_told_by_the_token():
    """A call that brought one token does not count as much as one that brought nine."""
    cost_model = SpeculationCostModel()
    cost_model.record_drafting("alone", 0.02, 1)
    cost_model.record_drafting("alone", 0.027, 9)
    assert cost_model.drafting_seconds("alone") < 0.007


def test_a_member_that_may_be_wrong_waits_for_the_others_where_doubts_come_often():
    """One call of the others then does for several places; where they are rare, calls behind a wrong token are lost."""
    cost_model = SpeculationCostModel()
    for graph in (0, 1):
        cost_model.record_call(graph, 1, 0.01)
    for _ in range(40):
        for doubtful in (True, False, False):
            cost_model.record_uncertainty(doubtful)
    cost_model.record_uncertainty(True)
    assert not cost_model.defer_verification(0.6, 0, [1])
    assert cost_model.defer_verification(0.9999, 0, [1])
    for _ in range(40):
        for doubtful in (True, True, True, False):
            cost_model.record_uncertainty(doubtful)
    cost_model.record_uncertainty(True)
    assert cost_model.defer_verification(0.7, 0, [1])
    assert not cost_model.defer_verification(0.5, 0, [1])
    assert cost_model.defer_verification(0.5, 0, [1, 2])  # whose calls nobody has measured: as long as the writer's


def test_reading_up_costs_the_student_by_the_token():
    cost_model = SpeculationCostModel()
    for tokens in [1, 4, 1, 9, 2] * 6:
        cost_model.record_call("student", tokens, 0.0015 + 0.0005 * tokens, verifies=False)
        cost_model.record_call(0, 1, 0.01)
        cost_model.record_step(0.01, 1)
    assert cost_model.drafting_seconds("student") == pytest.approx(0.002, rel=0.1)
    assert cost_model.extra_token_seconds("student") == pytest.approx(0.0005, rel=0.1)
    assert cost_model.extra_token_seconds("nobody") == 0
    assert cost_model.seconds_per_extra_token == pytest.approx(0.001, rel=0.1)  # it verifies nothing
    for _ in range(100):  # it is tried again some day
        cost_model.record_step(0.01, 1)
    assert cost_model.drafting_seconds("student") < 0.0005


def test_what_came_of_asking_counts_for_more_than_hope():
    """A drafter whose last call is always for nothing was taken for as good as its tokens' chance."""
    cost_model = SpeculationCostModel()
    for _ in range(20):
        cost_model.record_call(0, 1, 0.010)
        cost_model.record_call("student", 1, 0.003, verifies=False)
        cost_model.record_step(0.010, 1)
    hoped = cost_model.expected_saving("student", 9)
    assert hoped == pytest.approx(cost_model.plan_draft(0.5, 9, cost_model.drafting_seconds("student"))[1])
    for _ in range(20):
        cost_model.record_request("student", calls=3, drafted=1)
        cost_model.record_decision(("student", 3), accepted=True)
    assert cost_model.acceptance_probability("student") > 0.9
    before = cost_model.expected_saving("student", 9)
    assert before < 0.2 * hoped
    for _ in range(20):
        cost_model.record_request("student", calls=1, drafted=1)
        cost_model.record_decision(("student", 3), accepted=True)
    assert cost_model.expected_saving("student", 9) == pytest.approx(0.006, rel=0.3)
    for _ in range(20):
        cost_model.record_request("student", calls=3, drafted=1)
        cost_model.record_decision(("student", 0), accepted=False)
    assert cost_model.expected_saving("student", 9) < 0
    for _ in range(400):  # it is asked again some day
        cost_model.record_call(0, 1, 0.010)
        cost_model.record_step(0.010, 1)
    assert cost_model.expected_saving("student", 9) > 0


def test_what_a_member_costs_is_not_forgotten_while_others_write():
    cost_model = SpeculationCostModel()
    for graph in (0, 1):
        cost_model.record_call(graph, 1, 0.01)
    cost_model.record_step(0.02, 1)
    for _ in range(100):
        cost_model.record_call(0, 1, 0.01)
        cost_model.record_step(0.01, 1)
    assert cost_model.drafting_seconds(1) == pytest.approx(0.01)
