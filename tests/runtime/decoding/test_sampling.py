import numpy as np
import pytest

from edgemix.errors import InputError
from edgemix.runtime.decoding.sampling import (
    Sampling,
    choose_token,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
)

FOUR = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def kept(scores):
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


def test_top_k_keeps_the_most_probable():
    assert kept(keep_top_k(FOUR, 2)) == {1, 3}
    assert keep_top_k(FOUR, 0) is FOUR
    assert keep_top_k(FOUR, 9) is FOUR


def test_top_p_keeps_the_smallest_set_that_holds_the_share():
    assert kept(keep_top_p(FOUR, 0.39)) == {1}
    assert kept(keep_top_p(FOUR, 0.41)) == {1, 3}
    assert kept(keep_top_p(FOUR, 0.95)) == {0, 1, 2, 3}
    assert kept(keep_top_p(FOUR, 1e-9)) == {1}
    assert keep_top_p(FOUR, 1.0) is FOUR


def test_top_p_counts_the_share_of_what_earlier_filters_left():
    assert kept(keep_top_p(keep_top_k(FOUR, 2), 0.6)) == {1, 3}
    assert kept(keep_top_p(keep_top_k(FOUR, 2), 0.5)) == {1}


@pytest.mark.parametrize("p", [0.3, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary_equals_a_full_sort(p):
    """Tokens that no nucleus needs are left out of the sorting."""
    scores = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    order = np.argsort(-scores)
    share = np.cumsum(np.exp(scores[order].astype(np.float64)))
    count = int(np.searchsorted(share, p * share[-1])) + 1
    assert abs(len(kept(keep_top_p(scores, p))) - count) <= 1
    assert kept(keep_top_p(scores, p)) >= set(order[: count - 1].tolist())


def test_top_p_of_equal_scores_keeps_them_all():
    assert kept(keep_top_p(np.zeros(1_000, np.float32), 1e-9)) == set(range(1_000))


def test_min_p_is_relative_to_the_most_probable():
    assert kept(keep_min_p(FOUR, 0.6)) == {1, 3}
    assert kept(keep_min_p(FOUR, 1.0)) == {1}
    assert keep_min_p(FOUR, 0.0) is FOUR


def test_repetition_penalty_makes_seen_tokens_less_probable_whatever_their_sign():
    scores = np.array([-1.0, 2.0, -3.0, 4.0], np.float32)
    np.testing.assert_allclose(penalize_repetition(scores, np.array([0, 1]), 2.0), [-2, 1, -3, 4])
    np.testing.assert_array_equal(scores, [-1, 2, -3, 4])
    assert penalize_repetition(scores, np.array([0]), 1.0) is scores


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float((((counts - expected) ** 2) / expected).sum())


def test_sampled_frequencies_are_the_probabilities():
    probabilities = np.array([0.05, 0.4, 0.25, 0.3])
    generator = np.random.default_rng(7)
    scores = np.log(probabilities).astype(np.float32)
    counts = np.bincount([sample(scores, generator) for _ in range(20_000)], minlength=4)
    assert chi_square(counts, probabilities) < 16.27  # 99.9% point, 3 degrees of freedom


def test_sampling_from_a_large_vocabulary():
    """Tokens are drawn by blocks: the borders between them must not show."""
    generator = np.random.default_rng(7)
    scores = np.full(1_000, -np.inf, np.float32)
    tokens = [0, 255, 256, 300, 511, 767, 768, 999]
    probabilities = np.array([0.05, 0.2, 0.1, 0.15, 0.1, 0.1, 0.25, 0.05])
    scores[tokens] = np.log(probabilities)
    counts = np.bincount([sample(scores, generator) for _ in range(20_000)], minlength=1_000)
    assert counts[tokens].sum() == 20_000
    assert chi_square(counts[tokens], probabilities) < 24.3  # 99.9% point, 7 degrees of freedom


def test_temperature_sharpens():
    generator = np.random.default_rng(7)
    sampling = Sampling(temperature=0.5)
    counts = np.bincount([choose_token(FOUR, sampling, generator) for _ in range(20_000)], minlength=4)
    squared = np.exp(2 * FOUR.astype(np.float64))
    assert chi_square(counts, squared / squared.sum()) < 16.27


def test_impossible_tokens_are_never_drawn():
    scores = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    generator = np.random.default_rng(0)
    assert {sample(scores, generator) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("temperature", [1e-50, 1e-40, 1e-9])
def test_the_coldest_temperature_takes_the_best_token(temperature):
    """Dividing by a number that float32 holds as zero, or nearly, left no token at all."""
    assert choose_token(FOUR, Sampling(temperature=temperature), np.random.default_rng(0)) == 1


def test_temperature_zero_draws_no_random_number():
    generator = np.random.default_rng(0)
    assert choose_token(FOUR, Sampling(), generator) == 1
    assert generator.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e39},
    ],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)
