import itertools

import numpy as np
import pytest

from edgemix.bundle.manifest import Weights
from edgemix.errors import InputError
from edgemix.export.stages.weights import choose_adaptive, fit


@pytest.fixture
def log_probabilities():
    """Three members' token log-probabilities: the second is best on most tokens, the third on some, the first never."""
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(0.01, 0.2, (3, 4_000))
    probabilities[1, :2_500] += 0.5
    probabilities[2, 2_500:] += 0.5
    return np.log(probabilities)


@pytest.mark.parametrize(
    ("choice", "domains", "adaptive"),
    [("fit", "xy", True), ("fit", "x", False), ("adaptive", "x", True), ("fixed", "xy", False)],
)
def test_weights_fitted_on_several_domains_are_adaptive_unless_the_recipe_says_otherwise(choice, domains, adaptive):
    even = {"a": 0.5, "b": 0.5}
    weights = Weights("fit", even, dict.fromkeys(domains, even))
    assert choose_adaptive(weights, choice).adaptive == adaptive


def test_one_member_has_nothing_to_adapt():
    assert not choose_adaptive(Weights("fit", {"a": 1.0}, {"x": {"a": 1.0}, "y": {"a": 1.0}}), "fit").adaptive


def test_likelihood_never_falls(log_probabilities):
    history = fit(log_probabilities, max_steps=50, tolerance=0).log_likelihoods
    assert all(b >= a - 1e-15 for a, b in itertools.pairwise(history))


def test_stops_on_tolerance_at_the_maximum(log_probabilities):
    found = fit(log_probabilities)
    assert found.converged
    assert found.weights.sum() == pytest.approx(1)
    # At the maximum of a concave likelihood on the simplex every member's mean responsibility over its weight is at
    # most one, and one where the weight is not zero (Karush-Kuhn-Tucker).
    probabilities = np.exp(log_probabilities)
    slopes = (probabilities / (found.weights @ probabilities)).mean(axis=1)
    assert slopes.max() < 1 + 1e-3
    assert slopes[1:] == pytest.approx([1, 1], abs=1e-3)


def test_known_weights_are_recovered():
    """Tokens drawn from a mixture with known weights of two known distributions."""
    members = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    tokens = np.random.default_rng(1).choice(3, size=200_000, p=np.array([0.3, 0.7]) @ members)
    assert fit(np.log(members[:, tokens])).weights == pytest.approx([0.3, 0.7], abs=0.01)


def test_identical_members_keep_uniform_weights():
    row = np.log(np.random.default_rng(2).uniform(size=100))
    assert fit(np.stack([row, row])).weights == pytest.approx([0.5, 0.5])


def test_probabilities_too_small_for_floats():
    tiny = np.full((2, 10), -5_000.0)
    tiny[1] = -6_000.0
    assert fit(tiny).weights == pytest.approx([1, 0], abs=1e-6)


@pytest.mark.parametrize("bad", [np.zeros((2, 0)), np.full((2, 3), -np.inf), np.full((2, 3), np.nan)])
def test_fitting_without_possible_tokens_is_an_error(bad):
    with pytest.raises(InputError):
        fit(bad)
