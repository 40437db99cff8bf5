"""Continuations have the scores of whole texts, and common beginnings are read once."""

import numpy as np
import pytest
from helpers.onnx_members import VOCABULARY, random_member, write_bundle

from edgemix.errors import EdgemixError, InputError
from edgemix.runtime import Mixture
from edgemix.runtime.evaluation.log_likelihood import Continuation, score_continuations

CONTEXT = "Which bird sits on a mat in the wood, and sees at night? "
ANSWERS = ["An owl.", "An ox.", "A", "An owl.", "Nobody knows."]
MIXES = [
    {},
    {"weights": "second"},
    {"weights": "adaptive"},
    {"combine": "log-linear"},
    {"weights": {"shared": 0.2, "growing": 0.8}},
]


def ids(text):
    return list(text.encode())


def scores(mixture, pairs, **mix):
    texts = [Continuation(ids(context), ids(answer)) for context, answer in pairs]
    found = dict(score_continuations(mixture.ensemble(**mix), texts))
    return [found[index] for index in range(len(texts))]


@pytest.fixture
def read(graph_calls):
    """Counts the tokens that graphs read."""
    return graph_calls


@pytest.mark.parametrize("mix", MIXES)
def test_a_continuation_has_the_score_of_its_tokens_in_the_whole_text(pair, mix):
    pairs = [*((CONTEXT, answer) for answer in ANSWERS), ("An", " owl."), ("Why", "?"), (CONTEXT[:20], CONTEXT[20:])]
    for (context, answer), found in zip(pairs, scores(pair, pairs, **mix), strict=True):
        whole = pair.score(context + answer, **mix).log_probabilities
        np.testing.assert_allclose(found.log_probabilities, whole[-len(answer) :], atol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_a_token_is_greedy_if_it_is_the_most_probable(pair, mix):
    likely = ""
    for _ in range(4):
        best = pair.next_token_distribution(CONTEXT + likely, **mix)[:128].argmax()
        likely += chr(best)
    answers = (likely, ANSWERS[0])
    found = scores(pair, [(CONTEXT, answer) for answer in answers], **mix)
    for answer, score in zip(answers, found, strict=True):
        for at, greedy in enumerate(score.greedy):
            best = pair.next_token_distribution(CONTEXT + answer[:at], **mix).argmax()
            assert greedy == (best == ord(answer[at]))
    assert found[0].greedy.any()
    assert not found[1].greedy.all()


@pytest.mark.parametrize("mix", [{}, {"weights": "adaptive"}])
def test_common_beginnings_are_read_once(pair, read, mix):
    scores(pair, [(CONTEXT, answer) for answer in ANSWERS], **mix)
    tokens = len(CONTEXT) + sum(map(len, ANSWERS))
    assert sum(read) <= 2 * tokens  # by both members; without that it would be 2 * 5 * 57 and more


def test_the_order_of_texts_changes_nothing(pair):
    pairs = [(CONTEXT, answer) for answer in ANSWERS] + [("An", "y"), (CONTEXT[:9], "?"), (CONTEXT[:9], "??")]
    straight, back = (scores(pair, each, weights="adaptive") for each in (pairs, pairs[::-1]))
    for one, other in zip(straight, back[::-1], strict=True):
        np.testing.assert_array_equal(one.greedy, other.greedy)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_long_texts_are_read_in_calls_of_bounded_size(pair, monkeypatch, mix):
    pairs = [(CONTEXT, answer * 3) for answer in ANSWERS]
    whole = scores(pair, pairs, **mix)
    for member in pair._loaded:
        monkeypatch.setattr(member, "chunk", 4)
    for one, other in zip(scores(pair, pairs, **mix), whole, strict=True):
        np.testing.assert_array_equal(one.greedy, other.greedy)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


@pytest.mark.parametrize("mix", [{}, {"weights": "adaptive"}, {"combine": "log-linear"}, {"weights": {"b": 1}}])
def test_members_of_one_graph(tmp_path, mix):
    forms = {"a": random_member(1, tokens=VOCABULARY, padding=6), "b": random_member(2, tokens=VOCABULARY, padding=6)}
    for name, stacked in (("apart", False), ("stacked", True)):
        write_bundle(tmp_path / name, forms, stacked=stacked)
    apart, stacked = (Mixture.load(tmp_path / name, provider="cpu", threads=1) for name in ("apart", "stacked"))
    pairs = [(CONTEXT, answer) for answer in ANSWERS]
    for one, other in zip(scores(apart, pairs, **mix), scores(stacked, pairs, **mix), strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


def test_a_text_may_fill_the_context_and_have_one_token_more(mixture_of):
    mixture = mixture_of({"a": random_member(0, tokens=VOCABULARY, context=8)})
    assert len(scores(mixture, [("abc", "defghi")])[0].log_probabilities) == 6
    with pytest.raises(InputError, match="continuation 2 makes a text of 9 tokens, more than the context of 8"):
        scores(mixture, [("a", "b"), ("abc", "defghij")])


@pytest.mark.parametrize("pair_of_texts", [("", "a"), ("a", "")])
def test_both_parts_must_have_a_token(pair, pair_of_texts):
    with pytest.raises(InputError, match="at least one token"):
        scores(pair, [pair_of_texts])


def test_nan_ends_the_work(mixture_of):
    broken = random_member(0, tokens=VOCABULARY)
    broken.table[ord("b")] = np.nan
    mixture = mixture_of({"a": broken})
    assert len(scores(mixture, [("a", "a")])) == 1
    with pytest.raises(EdgemixError, match="not numbers"):
        scores(mixture, [("ab", "c")])


def test_padding_counts_where_the_model_itself_is_measured(pair):
    """lm-eval's own model takes the softmax over all rows of the model, those beyond the tokenizer's included."""
    graph = pair.graphs()[1]
    (logits,) = graph.extend_all(graph.new_cache(), [ids("An owl.")])
    rows = logits.astype(np.float64)[1:-1]
    whole = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    continuation = Continuation(ids("An"), ids(" owl."))
    ((_, found),) = score_continuations(pair.ensemble("second"), [continuation], padding=True)
    np.testing.assert_allclose(found.log_probabilities, whole[range(5), ids(" owl.")], atol=1e-4)
    ((_, mixed),) = score_continuations(pair.ensemble(), [continuation], padding=True)  # of graphs of two widths
    assert np.isfinite(mixed.log_probabilities).all()
