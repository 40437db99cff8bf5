"""The table of an evaluation, against closed forms of members that toss coins."""

import math

import numpy as np
import pytest
from helpers.onnx_members import VOCABULARY, ClosedForm, write_bundle

from edgemix.errors import InputError
from edgemix.runtime import Mixture
from edgemix.runtime.evaluation.evaluate import evaluate, score_documents

A, B = b"ab"


def coin(after_a, after_b):
    """A member that says nothing but "a" and "b": the probabilities of "a" after either."""
    table = np.full((VOCABULARY, VOCABULARY), -80.0, np.float32)
    for before, share in ((A, after_a), (B, after_b)):
        table[before, [A, B]] = np.log([share, 1 - share])
    return ClosedForm(table)


FOND, SHY = coin(0.75, 0.75), coin(0.25, 0.25)
STUDENT = coin(0.6, 0.2)
FIT = {"weights": {"fond": 0.9, "shy": 0.1}, "domains": {"as": {"fond": 1.0, "shy": 0.0}}}


@pytest.fixture
def table(tmp_path):
    """Evaluates the mixture of `FOND` and `SHY`, with or without a student."""

    def table(files, *, student=None, speed=False, members=None, **options):
        folder = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        write_bundle(folder, members or {"fond": FOND, "shy": SHY}, student=student, **options)
        loaded = {"provider": "cpu", "threads": 1}
        with Mixture.load(folder, **loaded) as mixture:
            if student is None:
                return evaluate(mixture, files, speed=speed)
            with Mixture.load(folder, **loaded, student=True) as alone:
                return evaluate(mixture, files, student=alone, speed=speed)

    return table


def names(evaluation):
    return [row.name for row in evaluation.rows]


def test_figures_equal_those_computed_by_hand(table):
    found = table({"as": ["aaaaa"], "bs": ["bbb", "bb", "b", ""]}, **FIT)
    fond, uniform = found.row("fond"), found.row("uniform")
    assert (fond.files["as"].tokens, fond.files["bs"].tokens, fond.overall.tokens) == (4, 3, 7)
    assert fond.files["as"].perplexity == pytest.approx(4 / 3)
    assert fond.files["bs"].bits_per_byte == pytest.approx(2)
    assert fond.overall.bits_per_byte == pytest.approx((4 * math.log2(4 / 3) + 3 * 2) / 7)
    assert uniform.overall.perplexity == pytest.approx(2)
    assert found.row("fitted").files["as"].perplexity == pytest.approx(1 / 0.7)


def test_adaptive_weights_follow_each_text_anew(table):
    """The fitted prior is 0.9 for fond, and its domain's weights: nothing changes within the first tokens of a text."""
    found = table({"x": ["bb", "b" * 60], "y": ["bb", "bb"]}, **FIT)
    shares = found.row("adaptive").weights
    at_first = shares["fond"] * 0.25 + shares["shy"] * 0.75
    assert sum(shares.values()) == pytest.approx(1)
    assert found.row("adaptive").files["y"].perplexity == pytest.approx(1 / at_first)
    assert 4 / 3 < found.row("adaptive").files["x"].perplexity < found.row("fitted").files["x"].perplexity


def test_agreement_equals_that_computed_by_hand(table):
    """The fitted mixture says "a" with 0.9 * 0.75 + 0.1 * 0.25 = 0.7, whatever came before."""
    found = table({"x": ["aab", "ba"], "y": ["aaa"]}, student=STUDENT, **FIT)
    fond, shy, student = (found.row(name) for name in ("fond", "shy", "student"))
    assert fond.overall.acceptance == pytest.approx(0.7 + 0.25)
    assert shy.overall.acceptance == pytest.approx(0.25 + 0.3)
    assert (fond.overall.agreement, shy.overall.agreement) == (1.0, 0.0)
    # Three tokens of x: two follow an "a", one a "b"; there the student says "b", and accepted is 0.2 + 0.3.
    assert student.files["x"].acceptance == pytest.approx((2 * (0.6 + 0.3) + 0.5) / 3)
    assert student.files["x"].agreement == pytest.approx(2 / 3)
    assert student.files["y"].acceptance == pytest.approx(0.9)
    assert student.overall.agreement == pytest.approx(4 / 5)
    assert student.files["x"].perplexity == pytest.approx((0.6 * 0.4 * 0.2) ** (-1 / 3))
    assert student.weights == {}


def test_mixtures_are_not_compared_with_themselves(table):
    found = table({"x": ["ab"]}, student=STUDENT, **FIT)
    for row in found.rows:
        assert (row.overall.agreement is None) == (row.overall.acceptance is None) == (row.kind == "mixture")


def test_a_row_for_each_model_and_each_mixture(table):
    assert names(table({"x": ["ab"]}, **FIT)) == ["fond", "shy", "uniform", "fitted", "fitted to as", "adaptive"]
    found = table({"x": ["ab"]}, student=STUDENT)
    assert names(found) == ["fond", "shy", "uniform", "given", "adaptive", "student"]
    assert [row.kind for row in found.rows] == ["member"] * 2 + ["mixture"] * 3 + ["student"]
    assert found.mixture == "given"


def test_a_mixture_of_one_is_its_member(table):
    found = table({"x": ["ab"]}, members={"fond": FOND}, student=STUDENT)
    assert names(found) == ["fond", "student"]
    assert found.mixture == "fond"
    assert found.row("fond").overall.acceptance == pytest.approx(1)
    assert found.row("student").overall.acceptance == pytest.approx(0.6 + 0.25)


def test_the_mixture_has_the_bundles_weights_even_if_a_member_has_their_name(table):
    found = table({"x": ["aa"]}, members={"given": FOND, "shy": SHY}, weights={"given": 0.0, "shy": 1.0})
    assert names(found) == ["given", "shy", "uniform", "given", "adaptive"]
    assert [row.overall.acceptance for row in found.rows[:2]] == pytest.approx([0.5, 1.0])


def test_one_hot_weights_give_that_members_figures(table):
    found = table({"x": ["abba"]}, **FIT)
    assert found.row("fitted to as").overall.perplexity == found.row("fond").overall.perplexity


def test_a_text_longer_than_the_smallest_context_is_read_in_windows(table):
    found = table({"x": ["ab" * 20]}, student=ClosedForm(STUDENT.table, context=5), **FIT)
    assert [row.overall.tokens for row in found.rows] == [39] * 7
    assert found.row("student").overall.agreement == pytest.approx(20 / 39)  # after each "a"


def test_max_tokens_limits_what_is_read(tmp_path):
    with Mixture.load(write_bundle(tmp_path / "b", {"fond": FOND, "shy": SHY}), threads=1) as mixture:
        found = evaluate(mixture, {"x": ["aaa", "bbb", "aaa"]}, max_tokens=5)
        assert found.rows[0].overall.tokens == 2 + 1
        own = score_documents(mixture, "x", ["aaa", "bbb", "aaa"], max_tokens=5)
        np.testing.assert_allclose(np.exp(own), [[0.75, 0.75, 0.25], [0.25, 0.25, 0.75]], atol=1e-6)


def test_speed_is_measured_only_if_requested(table):
    for speed in (True, False):
        found = table({"x": ["ab"]}, student=STUDENT, speed=speed)
        timed = [row.name for row in found.rows if row.decode_rate is not None]
        assert timed == (["fond", "shy", "given", "student"] if speed else [])
        assert all(row.decode_rate > 0 for row in found.rows if row.decode_rate is not None)
        generated = {row.name: row.generation_rate for row in found.rows if row.generation_rate is not None}
        assert list(generated) == (["given"] if speed else [])
        assert all(rate > 0 for rate in generated.values())


def test_the_rate_as_generated_is_that_of_the_default_weights(table):
    for adaptive, name in ((True, "adaptive"), (False, "fitted")):
        found = table({"x": ["ab"], "y": ["aa"]}, speed=True, adaptive=adaptive, **FIT)
        assert [row.name for row in found.rows if row.generation_rate is not None] == [name]


@pytest.mark.parametrize("files", [{}, {"empty": ["", "a"]}])
def test_nothing_to_score_is_an_error(table, files):
    with pytest.raises(InputError, match=r"empty|no text"):
        table(files)


def test_the_default_row_is_the_one_that_generation_uses(table):
    assert table({"x": ["ab"]}, **FIT).default == table({"x": ["ab"]}, **FIT).mixture
    assert table({"x": ["ab"]}, **FIT, adaptive=True).default == "adaptive"
    speeds = table({"x": ["ab"]}, **FIT, adaptive=True, speed=True)
    assert [row.name for row in speeds.rows if row.generation_rate is not None] == ["adaptive"]
