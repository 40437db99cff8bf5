"""Equivalences of mixtures over labels, on random members."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from edgemix.runtime.classification.calibration import fit_label_temperature, fit_temperature
from edgemix.runtime.classification.combining import combine

WAYS = ["linear", "log-linear", "bayes"]


def cases(count=200):
    """Yield random members, some of which abstain or do not know every label, weights and a log-prior."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        members, texts, labels = generator.integers(1, 5), 4, generator.integers(2, 6)
        known = generator.random((members, labels)) < 0.7
        known[np.arange(members), generator.integers(labels, size=members)] = True
        logits = np.where(known[:, None], generator.normal(0, 3, (members, texts, labels)), -np.inf)
        logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        present = generator.random((members, texts)) < 0.7
        prior = np.log(generator.dirichlet(np.full(labels, 3.0)))
        yield logs, generator.dirichlet(np.ones(members)), known, present, prior


@pytest.mark.parametrize("how", WAYS)
def test_mixtures_sum_to_one_in_any_order_and_without_warnings(how):
    """Guards: a log-linear mixture of which all members abstained warned of an invalid value."""
    for logs, weights, known, present, prior in cases():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mixed = combine(logs, weights, how, known=known, present=present, log_prior=prior)
        np.testing.assert_allclose(np.exp(mixed).sum(axis=-1), 1)
        np.testing.assert_allclose(
            np.exp(mixed[~present.any(axis=0)]), np.exp(prior)[None].repeat((~present.any(axis=0)).sum(), axis=0)
        )
        turned = combine(logs[::-1], weights[::-1], how, known=known[::-1], present=present[::-1], log_prior=prior)
        np.testing.assert_allclose(np.exp(turned), np.exp(mixed), atol=1e-12)


@pytest.mark.parametrize("how", WAYS)
def test_a_member_of_weight_zero_changes_nothing(how):
    """Guards: bayes counted members of weight zero, so that one-hot weights were not that member."""
    for logs, weights, known, present, prior in cases():
        mixed = combine(logs, weights, how, known=known, present=present, log_prior=prior)
        more = [np.concatenate([values, values[:1]]) for values in (logs, known, present)]
        padded = combine(more[0], np.append(weights, 0.0), how, known=more[1], present=more[2], log_prior=prior)
        np.testing.assert_allclose(np.exp(padded), np.exp(mixed), atol=1e-12)
        every = np.ones_like(known)
        whole = np.log(np.exp(logs) * 0.9 + 0.1 / logs.shape[-1])
        alone = combine(whole, np.eye(len(logs))[0], how, known=every, log_prior=prior)
        np.testing.assert_allclose(np.exp(alone), np.exp(whole[0]), atol=1e-12)


def test_logits_that_say_nothing_leave_the_temperature_alone():
    """Guards: scores that are all equal gave the coldest temperature."""
    assert fit_temperature(np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0])) == 1
    assert fit_label_temperature(np.zeros((4, 3), np.float32), np.eye(4, 3, dtype=np.bool_)) == 1
