"""Agreement and acceptance, against closed forms; and the decoding rate."""

import math

import numpy as np
import pytest
from helpers.onnx_members import ClosedForm, random_member, saying

from edgemix.errors import EdgemixError
from edgemix.runtime.evaluation import decode_rate
from edgemix.runtime.evaluation.decode_rate import ROUNDS, STEPS, decoding_rates
from edgemix.runtime.evaluation.draft_agreement import compare_tokens
from edgemix.runtime.mixing.ensemble import Ensemble

TOKENS = 16
FORMS = [random_member(1, padding=3), random_member(2, cache="growing"), random_member(3, padding=7)]
WEIGHTS = np.array([0.3, 0.7, 0.0])
"""The third is a student with weight zero."""


@pytest.fixture
def ensemble(load):
    return Ensemble(tuple(load(form) for form in FORMS), WEIGHTS, "linear", TOKENS)


def compare(ensemble, ids, window=4096):
    told = []
    found = compare_tokens(ensemble, np.array(ids), scored_bytes=7, window=window, advance=told.append)
    assert sum(told) == len(ids) - 1
    return found


def test_closed_forms(ensemble):
    ids = np.random.default_rng(0).integers(0, TOKENS, 60).tolist()
    own = np.stack([form.log_probabilities(ids)[:-1] for form in FORMS])
    mixed = np.einsum("m,mtv->tv", WEIGHTS, np.exp(own))

    found = compare(ensemble, ids)

    np.testing.assert_allclose(found.log_probabilities, own[:, range(59), ids[1:]], atol=1e-4)
    np.testing.assert_array_equal(found.agreements, own.argmax(-1) == mixed.argmax(-1))
    np.testing.assert_allclose(found.acceptances, np.minimum(np.exp(own), mixed).sum(-1), atol=1e-5)
    np.testing.assert_allclose(found.acceptances, 1 - 0.5 * np.abs(np.exp(own) - mixed).sum(-1), atol=1e-5)
    assert 0 < found.agreements.mean() < 1


def test_chunks_do_not_change_the_result(ensemble, monkeypatch):
    ids = list(range(TOKENS)) * 2
    whole = compare(ensemble, ids)
    for member in ensemble.graphs:
        monkeypatch.setattr(member, "chunk", 5)
    parts = compare(ensemble, ids)
    np.testing.assert_allclose(parts.acceptances, whole.acceptances, atol=1e-6)
    np.testing.assert_array_equal(parts.agreements, whole.agreements)


def test_a_model_equal_to_the_mixture_is_always_accepted(load):
    same = load(FORMS[0])
    found = compare(Ensemble((same, same), np.array([1.0, 0.0]), "linear", TOKENS), [1, 2, 3])
    np.testing.assert_allclose(found.acceptances, 1, atol=1e-6)
    assert found.agreements.all()


def test_a_model_disjoint_from_the_mixture_is_never_accepted(load):
    sure = np.full((2, TOKENS, TOKENS), -90.0, np.float32)
    sure[0, :, 3] = sure[1, :, 4] = 90
    models = tuple(load(ClosedForm(table)) for table in sure)
    found = compare(Ensemble(models, np.array([1.0, 0.0]), "linear", TOKENS), [3, 3, 4])
    np.testing.assert_allclose(found.acceptances, [[1, 1], [0, 0]], atol=1e-12)
    np.testing.assert_allclose(found.log_probabilities, [[0, -180], [-180, 0]], atol=1e-4)  # not -inf


def test_nan_is_an_error(load):
    table = np.full((TOKENS, TOKENS), np.nan, np.float32)
    with pytest.raises(EdgemixError, match="not numbers"):
        compare(Ensemble((load(ClosedForm(table)),), np.array([1.0]), "linear", TOKENS), [1, 2])


def test_the_first_turn_is_a_warm_up_and_the_median_token_counts(ensemble, monkeypatch):
    seconds = iter([[9.0], [9.0], [0.5, 7.0], [0.25], [0.5], [0.25, 0.2], [0.4, 0.5], [0.125, 0.25]])
    monkeypatch.setattr(decode_rate, "decode_times", lambda *_: next(seconds))
    assert decoding_rates([ensemble, ensemble], [1], context=100) == [2.0, 4.0]


def test_every_turn_decodes_the_same_number_of_tokens(load, monkeypatch):
    """An end of text would end a turn early, and another one for each model."""
    member = load(saying("No"))
    calls = []
    for name in ("extend", "extend_all"):
        real = getattr(type(member), name)
        monkeypatch.setattr(type(member), name, lambda *a, real=real, **o: calls.append(1) or real(*a, **o))
    (rate,) = decoding_rates([Ensemble((member,), np.ones(1), "linear", 258)], [ord("N")], context=4096)
    assert len(calls) == (ROUNDS + 1) * (STEPS + 1)
    assert rate > 0


@pytest.mark.parametrize(("context", "measured"), [(1, False), (3, True), (40, True)])
def test_short_contexts(load, context, measured):
    member = load(random_member(0, context=context))
    (rate,) = decoding_rates([Ensemble((member,), np.ones(1), "linear", TOKENS)], [1, 2, 3] * 20, context=context)
    assert (rate > 0) if measured else math.isnan(rate)
