"""Temperatures, weights and mixtures over labels: closed forms and equivalences."""

import numpy as np
import pytest

from edgemix.errors import InputError
from edgemix.runtime.classification.calibration import fit_label_temperature, fit_temperature, label_prior
from edgemix.runtime.classification.combining import combine, yes_and_no
from edgemix.runtime.classification.fitting import climb, fit_weights

GENERATOR = np.random.default_rng(0)
WAYS = ("linear", "log-linear", "bayes")


def distributions(*shape):
    logits = GENERATOR.normal(size=shape) * 2
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("how", WAYS)
def test_mixtures_sum_to_one_and_one_member_is_itself(how):
    logs = distributions(3, 5, 4)
    weights = np.array([0.5, 0.3, 0.2])
    prior = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    known = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], bool)
    present = GENERATOR.random((3, 5)) > 0.4
    logs = np.where(known[:, None], logs, -np.inf)
    logs -= np.logaddexp.reduce(logs, axis=-1, keepdims=True)
    found = combine(logs, weights, how, known=known, present=present, log_prior=prior)
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, atol=1e-12)
    own = combine(logs[:1], np.ones(1), how, log_prior=prior)
    np.testing.assert_allclose(own, logs[0], atol=1e-12)
    one_hot = combine(logs, np.array([1.0, 0, 0]), "linear", known=known)
    np.testing.assert_allclose(one_hot, logs[0], atol=1e-12)
    same = combine(np.stack([logs[0]] * 3), weights, "log-linear")
    np.testing.assert_allclose(same, logs[0], atol=1e-12)


def test_who_abstains_leaves_the_weight_to_the_others():
    logs, weights = distributions(3, 1, 2), np.array([0.5, 0.3, 0.2])
    present = np.array([[True], [False], [True]])
    found = combine(logs, weights, present=present)
    expected = (0.5 * np.exp(logs[0]) + 0.2 * np.exp(logs[2])) / 0.7
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-12)
    nobody = combine(logs, weights, present=np.zeros((3, 1), bool), log_prior=np.log([0.25, 0.75]))
    np.testing.assert_allclose(np.exp(nobody), [[0.25, 0.75]])


def test_bayes_is_the_product_of_posteriors_over_the_prior():
    """Two members that see independent halves of the evidence give the posterior of both."""
    prior, first, second = np.array([0.7, 0.3]), np.array([0.2, 0.6]), np.array([0.5, 0.1])

    def posterior(likelihood):
        return np.log(prior * likelihood / (prior * likelihood).sum())

    logs = np.stack([posterior(first), posterior(second)])[:, None]
    found = combine(logs, np.array([0.5, 0.5]), "bayes", log_prior=np.log(prior))
    np.testing.assert_allclose(found[0], posterior(first * second), atol=1e-12)


def test_a_label_is_not_vetoed_by_who_does_not_know_it():
    logs = np.log(np.array([[[0.1, 0.9, 0.0]], [[0.2, 0.0, 0.8]]]) + 1e-300)
    known = np.array([[1, 1, 0], [1, 0, 1]], bool)
    for how in ("log-linear", "bayes"):
        found = np.exp(combine(logs, np.array([0.5, 0.5]), how, known=known))[0]
        assert found.min() > 0.01
        assert found[0] < found[1]


def test_the_temperature_that_made_the_labels_is_found():
    logits = GENERATOR.normal(size=(20_000, 3)) * 3
    labels = (logits / 2.5 + GENERATOR.gumbel(size=logits.shape)).argmax(axis=-1)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)
    labels[::3] = -1  # where a member abstains
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)
    yes = GENERATOR.random(logits.shape) < 1 / (1 + np.exp(-logits / 0.5))
    assert fit_label_temperature(logits, yes) == pytest.approx(0.5, rel=0.05)


def test_a_temperature_stays_finite_where_every_example_is_right():
    assert 0.02 <= fit_temperature(np.array([[9.0, 0], [0, 9.0]] * 10), np.array([0, 1] * 10)) < 5
    assert fit_temperature(np.zeros((4, 2)), np.array([0, 1, 0, 1])) > 0
    assert fit_temperature(np.zeros((0, 2)), np.zeros(0, int)) == 1
    assert label_prior(np.array([0, 0, 1, -1]), 2).sum() == pytest.approx(1)


def test_weights_climb_to_the_likeliest_with_abstentions():
    right = np.log(GENERATOR.uniform(0.01, 1, size=(3, 400)))
    present = GENERATOR.random((3, 400)) > 0.3
    present[:, ~present.any(axis=0)] = True
    found = fit_weights(right, present)

    def score(weights):
        mixed = (weights[:, None] * np.exp(right) * present).sum(axis=0)
        return float(np.log(mixed / (weights @ present)).mean())

    best = score(found.weights)
    for _ in range(200):
        assert score(GENERATOR.dirichlet(np.ones(3))) <= best + 1e-9
    np.testing.assert_allclose(climb(score, 3), found.weights, atol=0.02)
    assert fit_weights(right[:1], present[:1] | True).weights == pytest.approx([1.0])


def test_counts_carry_a_fit_over_to_new_examples():
    """Feedback on new examples, from the counts of old ones, is near a fit to all of them."""
    right = np.log(GENERATOR.uniform(0.01, 1, size=(3, 2000)))
    right[1] += 0.5
    old = fit_weights(right[:, :1500])
    online = fit_weights(right[:, 1500:], prior=old.counts).weights
    whole = fit_weights(right).weights
    np.testing.assert_allclose(online, whole, atol=0.02)


def test_examples_that_nobody_can_explain_are_refused_or_left_out():
    right = np.array([[0.0, -np.inf], [-1.0, -np.inf]])
    assert fit_weights(right).weights[0] > 0.99
    with pytest.raises(InputError, match="no member knows"):
        fit_weights(np.full((2, 3), -np.inf))


def test_yes_and_no():
    found = np.exp(yes_and_no(np.array([0.0, 800.0, -800.0])))
    np.testing.assert_allclose(found, [[0.5, 0.5], [0, 1], [1, 0]], atol=1e-12)
