import numpy as np
import pytest

from edgemix.errors import InputError
from edgemix.runtime.mixing.arithmetic import (
    combine_log_probabilities,
    linear,
    log_linear,
    log_softmax,
    normalize,
    target_log_probabilities,
)


def random_log_probabilities(*shape, seed=0):
    return log_softmax(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 4)


def test_log_softmax_is_the_definition_and_survives_large_logits():
    logits = np.array([[0.0, 1.0, 2.0], [10_000.0, 9_999.0, -10_000.0]], np.float32)
    expected = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    np.testing.assert_allclose(log_softmax(logits)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(log_softmax(logits)[1, :2], [-0.313262, -1.313262], rtol=1e-5)
    assert log_softmax(logits).dtype == np.float32


def test_an_impossible_token_stays_impossible_without_a_nan():
    logits = np.array([-np.inf, 0.0, 0.0], np.float32)
    np.testing.assert_allclose(log_softmax(logits), [-np.inf, -np.log(2), -np.log(2)], rtol=1e-6)
    mixed = linear(np.stack([log_softmax(logits)] * 2), np.array([0.5, 0.5]))
    np.testing.assert_allclose(mixed, [-np.inf, -np.log(2), -np.log(2)], rtol=1e-6)


def test_linear_averages_probabilities():
    parts = np.stack([random_log_probabilities(2, 50, seed=seed) for seed in range(3)])
    weights = np.array([0.5, 0.3, 0.2])
    expected = sum(weight * np.exp(part.astype(np.float64)) for weight, part in zip(weights, parts, strict=True))
    np.testing.assert_allclose(np.exp(linear(parts, weights)), expected, rtol=1e-5)


def test_linear_works_in_log_space():
    """A plain average of float32 probabilities would lose what both members find less likely than e^-104."""
    parts = np.array([[0.0, -200.0], [0.0, -202.0]], np.float32)
    expected = -200 + np.log(0.5 * (1 + np.exp(-2)))
    np.testing.assert_allclose(linear(parts, np.array([0.5, 0.5]))[1], expected, rtol=1e-6)


def test_log_linear_is_the_normalised_geometric_mean():
    parts = np.stack([random_log_probabilities(50, seed=seed) for seed in range(2)])
    geometric = np.exp(0.25 * parts[0].astype(np.float64) + 0.75 * parts[1])
    np.testing.assert_allclose(
        np.exp(log_linear(parts, np.array([0.25, 0.75]))), geometric / geometric.sum(), rtol=1e-5
    )


@pytest.mark.parametrize("combine", ["linear", "log-linear"])
def test_equal_members_are_the_member_and_probabilities_sum_to_one(combine):
    part = random_log_probabilities(3, 50)
    mixed = combine_log_probabilities(np.stack([part, part]), np.array([0.3, 0.7]), combine)
    np.testing.assert_allclose(mixed, part, atol=1e-5)
    other = random_log_probabilities(3, 50, seed=1)
    mixed = combine_log_probabilities(np.stack([part, other]), np.array([0.3, 0.7]), combine)
    np.testing.assert_allclose(np.exp(mixed.astype(np.float64)).sum(-1), 1, atol=1e-5)


def test_inputs_are_left_alone():
    parts = np.stack([random_log_probabilities(20), random_log_probabilities(20, seed=1)])
    before = parts.copy()
    linear(parts, np.array([0.5, 0.5]))
    log_linear(parts, np.array([0.5, 0.5]))
    np.testing.assert_array_equal(parts, before)


def test_target_log_probabilities_are_entries_of_log_softmax():
    logits = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    targets = np.array([3, 0, 29, 7])
    np.testing.assert_allclose(
        target_log_probabilities(logits, targets), log_softmax(logits)[range(4), targets], rtol=1e-5
    )


def test_weights_are_normalised_and_missing_members_weigh_nothing():
    np.testing.assert_allclose(normalize({"b": 3, "a": 1}, ["a", "b", "c"]), [0.25, 0.75, 0])
    np.testing.assert_allclose(normalize({"a": 1e300, "b": 1e300}, ["a", "b"]), [0.5, 0.5])
    np.testing.assert_allclose(normalize({"a": 1e-320, "b": 0}, ["a", "b"]), [1, 0])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "x": 1}, "'x'"),
        ({"a": -1.0, "b": 2}, "a=-1.0"),
        ({"a": float("nan")}, "a=nan"),
        ({"a": float("inf")}, "a=inf"),
        ({"a": 0, "b": 0}, "zero"),
        ({}, "zero"),
    ],
)
def test_senseless_weights_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        normalize(weights, ["a", "b"])
