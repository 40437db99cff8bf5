"""When another drafted token pays, from what calls took and how drafts fared."""

import pytest

from edgemix.runtime.decoding.cost_model import Pace


def test_the_pace_finds_what_a_token_costs():
    pace = Pace()
    for drafted in [0, 3, 1, 5, 2, 0, 4] * 5:
        seconds = 0.010 + 0.001 * drafted
        pace.called(0, 1 + drafted, seconds)
        pace.stepped(seconds, 1)
    assert pace.further == pytest.approx(0.001, rel=0.15)
    pace.called(0, 400, 0.2)  # a prompt's token takes less, and tells nothing of one of few
    assert pace.further == pytest.approx(0.001, rel=0.15)
    assert pace.pays(0.2)
    assert not pace.pays(0.02)
    assert not pace.pays(0.5, seconds=0.020)


def test_the_pace_learns_who_is_right():
    pace = Pace()
    for _ in range(30):
        pace.tried(("lookup", 2), accepted=False)
        pace.tried(("student", 3), accepted=True)
    assert pace.chance(("lookup", 2)) < 0.1
    assert pace.chance(("student", 3)) > 0.95
    for _ in range(200):  # and tries again some day
        pace.stepped(0.01, 1)
    assert pace.chance(("lookup", 2)) > 0.45
    assert pace.chance(("student", 3)) < 0.75


def test_what_two_members_read_costs_both():
    """However different they are, and whoever of them reads more at once."""
    pace = Pace()
    for _ in range(10):
        for tokens in (1, 2, 1, 3):
            pace.called(0, tokens, 0.040 + 0.004 * tokens, verifies=tokens == 1)
        for tokens in (5, 7):
            pace.called(1, tokens, 0.008 + 0.001 * tokens)
        pace.stepped(0.2, 5)
    assert pace.further == pytest.approx(2 * 0.004 + 2 * 0.001, rel=0.1)
    with pace.alone(0):
        assert pace.further == pytest.approx(0.004, rel=0.1)
        assert pace.seconds == pytest.approx(0.044, rel=0.1)
    assert pace.seconds == pytest.approx(0.04)


def test_a_draft_is_as_long_as_pays():
    pace = Pace()
    for tokens in [1, 4, 2, 6, 3] * 5:
        pace.called(0, tokens, 0.009 + 0.001 * tokens)
        pace.stepped(0.010, 1)
    count, saved = pace.plan(0.5, 15)
    assert count == 3
    assert saved == pytest.approx(0.00875 - 3 * pace.further, rel=0.1)
    assert pace.plan(0.5, 2)[0] == 2
    assert pace.plan(0.5, 15, 0.006) == (0, 0.0)


def test_what_took_long_once_is_tried_again():
    pace = Pace()
    pace.drafted("alone", 0.05)
    before = pace.drafting("alone")
    for _ in range(100):
        pace.stepped(0.01, 1)
    assert before == 0.05
    assert pace.drafting("alone") < 0.01


def test_drafting_is_told_by_the_token():
    """A call that brought one token does not count as much as one that brought nine."""
    pace = Pace()
    pace.drafted("alone", 0.02, 1)
    pace.drafted("alone", 0.027, 9)
    assert pace.drafting("alone") < 0.007


def test_a_member_that_may_be_wrong_waits_for_the_others_where_doubts_come_often():
    """One call of the others then does for several places; where they are rare, calls behind a wrong token are lost."""
    pace = Pace()
    for graph in (0, 1):
        pace.called(graph, 1, 0.01)
    for _ in range(40):
        for doubtful in (True, False, False):
            pace.doubted(doubtful)
    pace.doubted(True)
    assert not pace.waits(0.6, 0, [1])
    assert pace.waits(0.9999, 0, [1])
    for _ in range(40):
        for doubtful in (True, True, True, False):
            pace.doubted(doubtful)
    pace.doubted(True)
    assert pace.waits(0.7, 0, [1])
    assert not pace.waits(0.5, 0, [1])
    assert pace.waits(0.5, 0, [1, 2])  # whose calls nobody has measured: as long as the writer's


def test_reading_up_costs_the_student_by_the_token():
    pace = Pace()
    for tokens in [1, 4, 1, 9, 2] * 6:
        pace.called("student", tokens, 0.0015 + 0.0005 * tokens, verifies=False)
        pace.called(0, 1, 0.01)
        pace.stepped(0.01, 1)
    assert pace.drafting("student") == pytest.approx(0.002, rel=0.1)
    assert pace.reading("student") == pytest.approx(0.0005, rel=0.1)
    assert pace.reading("nobody") == 0
    assert pace.further == pytest.approx(0.001, rel=0.1)  # it verifies nothing
    for _ in range(100):  # it is tried again some day
        pace.stepped(0.01, 1)
    assert pace.drafting("student") < 0.0005


def test_what_came_of_asking_counts_for_more_than_hope():
    """A drafter whose last call is always for nothing was taken for as good as its tokens' chance."""
    pace = Pace()
    for _ in range(20):
        pace.called(0, 1, 0.010)
        pace.called("student", 1, 0.003, verifies=False)
        pace.stepped(0.010, 1)
    hoped = pace.promise("student", 9)
    assert hoped == pytest.approx(pace.plan(0.5, 9, pace.drafting("student"))[1])
    for _ in range(20):
        pace.asked("student", calls=3, drafted=1)
        pace.tried(("student", 3), accepted=True)
    assert pace.chance("student") > 0.9
    before = pace.promise("student", 9)
    assert before < 0.2 * hoped
    for _ in range(20):
        pace.asked("student", calls=1, drafted=1)
        pace.tried(("student", 3), accepted=True)
    assert pace.promise("student", 9) == pytest.approx(0.006, rel=0.3)
    for _ in range(20):
        pace.asked("student", calls=3, drafted=1)
        pace.tried(("student", 0), accepted=False)
    assert pace.promise("student", 9) < 0
    for _ in range(400):  # it is asked again some day
        pace.called(0, 1, 0.010)
        pace.stepped(0.010, 1)
    assert pace.promise("student", 9) > 0


def test_what_a_member_costs_is_not_forgotten_while_others_write():
    pace = Pace()
    for graph in (0, 1):
        pace.called(graph, 1, 0.01)
    pace.stepped(0.02, 1)
    for _ in range(100):
        pace.called(0, 1, 0.01)
        pace.stepped(0.01, 1)
    assert pace.drafting(1) == pytest.approx(0.01)
