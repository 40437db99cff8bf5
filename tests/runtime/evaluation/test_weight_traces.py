"""Adaptive weights along texts."""

import numpy as np
import pytest
from helpers.onnx_members import BOS, random_member, saying

from edgemix.runtime import Mixture
from edgemix.runtime.evaluation.weight_traces import STREAM, trace_weights
from edgemix.runtime.mixing.adaptive import adaptive_targets

MATH = "1+2=3"


@pytest.fixture
def mixture(bundle):
    with Mixture.load(bundle, provider="cpu", threads=1) as mixture:
        yield mixture


def test_weights_are_those_before_each_token(mixture):
    (trace,) = trace_weights(mixture, {"sums": [MATH]})

    experts = mixture.full_ensemble("adaptive").prior
    _, path = adaptive_targets(mixture.score(MATH).member_log_probabilities, experts)
    assert (trace.name, "".join(trace.pieces)) == ("sums", MATH)
    np.testing.assert_allclose(trace.weights["math"], [experts.weights[0], *path[0]])
    assert trace.weights["math"][-1] > 0.9


def test_a_stream_alternates_between_the_texts(mixture):
    stream, sums, words = trace_weights(mixture, {"sums": [MATH * 3], "words": ["def x", "def x"]}, tokens=10)

    assert (stream.name, sums.name, words.name) == (STREAM, "sums", "words")
    assert "".join(stream.pieces) == "1+2=3\n\ndef x\n\n1+2=3\n\n\n\ndef\n\n"
    assert stream.origins == ((0, "sums"), (7, "words"), (14, "sums"), (21, "words"))
    assert stream.weights["math"][4] > 0.9
    assert stream.weights["code"][11] > 0.9


def test_no_more_tokens_than_asked_for(mixture):
    (trace,) = trace_weights(mixture, {"sums": [MATH * 1000]}, tokens=7)

    assert len(trace.pieces) == 7
    assert all(len(weights) == 7 for weights in trace.weights.values())


def test_a_character_stands_at_its_last_token(mixture):
    (trace,) = trace_weights(mixture, {"greek": ["aπb"]})

    assert trace.pieces == ("a", "", "π", "b")


def test_a_beginning_of_text_token_is_read_and_not_shown(mixture_of):
    mixture = mixture_of({"a": random_member(1, tokens=258), "b": saying("xyz")}, bos=BOS)

    (trace,) = trace_weights(mixture, {"text": ["xyz"]})

    experts = mixture.full_ensemble("adaptive").prior
    _, path = adaptive_targets(mixture.score("xyz").member_log_probabilities, experts)
    assert trace.pieces == ("x", "y", "z")
    np.testing.assert_allclose(trace.weights["a"], path[0])


def test_one_member_has_no_weights_to_follow(mixture_of):
    assert trace_weights(mixture_of({"a": saying("xyz")}), {"text": ["xyz"]}) == ()
