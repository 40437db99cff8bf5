"""Log-probabilities of texts and next-token distributions against closed forms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from helpers.onnx_members import BOS, VOCABULARY, mixed, random_member

from edgemix.errors import InputError
from edgemix.runtime.evaluation.evaluate import evaluate
from edgemix.runtime.evaluation.weight_traces import trace_weights


def test_scores_are_exact(pair, pair_forms):
    text = "Some text, größer."
    score = pair.score(text)
    ids = list(text.encode())
    assert score.token_ids.tolist() == ids
    for own, form in zip(score.member_log_probabilities, pair_forms.values(), strict=True):
        np.testing.assert_allclose(own, form.log_probabilities(ids)[range(len(ids) - 1), ids[1:]], atol=1e-4)
    expected = mixed(pair_forms.values(), [0.7, 0.3], ids)
    np.testing.assert_allclose(score.log_probabilities, expected, atol=1e-4)
    assert score.scored_bytes == len(ids) - 1
    assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(-expected.sum() / math.log(2) / (len(ids) - 1), rel=1e-4)


def test_log_linear_scores_are_normalized_over_the_vocabulary(pair, pair_forms):
    ids = list(b"Some text")
    product = sum(
        weight * form.log_probabilities(ids)[:-1] for weight, form in zip([0.7, 0.3], pair_forms.values(), strict=True)
    )
    expected = (product - np.log(np.exp(product).sum(-1, keepdims=True)))[range(len(ids) - 1), ids[1:]]
    score = pair.score("Some text", combine="log-linear")
    np.testing.assert_allclose(score.log_probabilities, expected, atol=1e-4)


def test_scores_and_distributions_agree(pair):
    score = pair.score("abcd", combine="log-linear")
    for at, (token, log_probability) in enumerate(zip(b"bcd", score.log_probabilities, strict=True), start=1):
        distribution = pair.next_token_distribution("abcd"[:at], combine="log-linear")
        assert distribution[token] == pytest.approx(math.exp(log_probability), rel=1e-4)


def test_chunks_do_not_change_scores(pair, monkeypatch):
    text = "a text of some forty characters or so...."
    whole = pair.score(text)
    for member in pair._loaded:
        monkeypatch.setattr(member, "chunk", 7)
    np.testing.assert_allclose(pair.score(text).log_probabilities, whole.log_probabilities, atol=1e-5)


def test_long_texts_are_scored_in_windows(pair, pair_forms):
    """Each window begins with nothing before it; its first token is what the window before leads to."""
    ids = list(b"twelve bytes")
    score = pair.score("twelve bytes", window=5)
    windows = [ids[0:6], ids[5:11], ids[10:12]]
    expected = np.concatenate([mixed(pair_forms.values(), [0.7, 0.3], window) for window in windows])
    np.testing.assert_allclose(score.log_probabilities, expected, atol=1e-4)


def test_every_window_begins_with_the_beginning_of_text_token(mixture_of):
    """Models that were trained with it are lost without it, after the first window, too (llama.cpp 1303)."""
    forms = {"a": random_member(3, tokens=VOCABULARY), "b": random_member(4, tokens=VOCABULARY)}
    mixture = mixture_of(forms, weights={"a": 0.6, "b": 0.4}, bos=BOS)
    ids = list(b"twelve bytes")
    score = mixture.score("twelve bytes", window=5)
    windows = [
        ids[0:5],
        ids[4:9],
        ids[8:12],
    ]  # what each predicts, after what it reads: at most 5 tokens with the first
    expected = [mixed(forms.values(), [0.6, 0.4], [BOS, *window]) for window in windows]
    expected = np.concatenate([expected[0], *(each[1:] for each in expected[1:])])
    np.testing.assert_allclose(score.log_probabilities, expected, atol=1e-4)


def test_a_text_longer_than_the_context_can_be_scored(mixture_of):
    mixture = mixture_of({"a": random_member(0, tokens=VOCABULARY, context=8)})
    assert len(mixture.score("x" * 30).log_probabilities) == 29
    with pytest.raises(InputError, match="window"):
        mixture.score("xyz", window=9)


def test_one_hot_weights_score_as_that_member(pair):
    score = pair.score("some text", weights="second")
    np.testing.assert_allclose(score.log_probabilities, score.member_log_probabilities[1])


def test_a_list_of_texts_gives_a_list_of_scores(pair):
    scores = pair.score(["one text", "another"])
    np.testing.assert_array_equal(scores[1].log_probabilities, pair.score("another").log_probabilities)
    assert pair.score([]) == []


@pytest.mark.parametrize("text", ["", "x"])
def test_too_little_text_cannot_be_scored(pair, text):
    with pytest.raises(InputError):
        pair.score(text)


class Listener:
    def __init__(self):
        self.total, self.done = 0.0, 0.0

    @contextmanager
    def stage(self, title: str, total: float | None = None) -> Iterator["Listener"]:
        self.total += total or 0
        yield self

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self.done += amount

    def log(self, line: str) -> None: ...


def test_scoring_reports_progress(pair):
    listener = Listener()
    pair.score(["one text", "another"], progress=listener)
    assert listener.done == listener.total == len("one text") + len("another") - 2


# Distributions


@pytest.mark.parametrize("combine", ["linear", "log-linear"])
def test_a_distribution_sums_to_one_over_the_tokenizers_vocabulary(pair, combine):
    distribution = pair.next_token_distribution("Some text", combine=combine)
    assert distribution.shape == (VOCABULARY,)
    assert distribution.dtype == np.float64
    assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_padding_never_takes_probability(pair, pair_forms):
    """Members pad their vocabularies to 264 and 272; the padding's logits are larger than all others."""
    expected = sum(
        weight * np.exp(form.log_probabilities(list(b"ab"))[-1])
        for weight, form in zip([0.7, 0.3], pair_forms.values(), strict=True)
    )
    np.testing.assert_allclose(pair.next_token_distribution("ab"), expected, atol=1e-6)


def test_a_distribution_after_too_long_a_text_is_refused(mixture_of):
    with pytest.raises(InputError, match="context"):
        mixture_of({"a": random_member(0, tokens=VOCABULARY, context=8)}).next_token_distribution("x" * 9)


@pytest.mark.parametrize("window", [0, 1, 1 << 30])
def test_a_window_out_of_its_bounds_is_refused_everywhere(mixture_of, window):
    """With a beginning-of-text token, a window of one token never ended."""
    mixture = mixture_of({name: random_member(seed, tokens=VOCABULARY) for seed, name in enumerate("ab")}, bos=BOS)
    calls = [
        lambda: mixture.score("abc", window=window),
        lambda: trace_weights(mixture, {"x": ["abc"]}, window=window),
        *([lambda: evaluate(mixture, {"x": ["abc"]}, window=window, speed=False)] if window < 2 else []),
    ]
    for call in calls:
        with pytest.raises(InputError, match="window must be between 2 and the context"):
            call()
