"""StaticBatch with known distributions: token ids only, no tokenizer."""

import numpy as np
import pytest
from helpers.onnx_members import ClosedForm, random_member

from edgemix.errors import EdgemixError
from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.decoding.static_batch import StaticBatch, next_token_log_probabilities
from edgemix.runtime.mixing.ensemble import Ensemble

TOKENS = 16


@pytest.fixture
def forms():
    return [random_member(1), random_member(2, cache="growing", padding=3)]


@pytest.fixture
def members(forms, load):
    return [load(form) for form in forms]


def ensemble(members, weights, combine="linear"):
    return Ensemble.of(members, np.array(weights), combine, TOKENS)


class Text(list):
    """The tokens of a sequence, with their log-probabilities."""


def run(mixture, prompts, sampling=Sampling(), *, seeds=None, max_new_tokens=8, context=100, eos=()):  # noqa: B008
    decoding = StaticBatch(
        mixture,
        prompts,
        sampling,
        seeds=seeds or [0] * len(prompts),
        max_new_tokens=max_new_tokens,
        context=context,
        eos=eos,
    )
    texts = [Text() for _ in prompts]
    while tokens := decoding.step():
        for token in tokens:
            texts[token.sequence].append(token)
    for number, text in enumerate(texts):
        text.log_probabilities = decoding.log_probabilities(number)
    decoding.close()
    return texts


def ids(text):
    return [token.id for token in text]


def expected_mixture(forms, weights, text):
    parts = [np.exp(form.log_probabilities(text)[-1]) for form in forms]
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def test_greedy_decoding_follows_the_exact_mixture(forms, members):
    text = [3, 7]
    (tokens,) = run(ensemble(members, [0.6, 0.4]), [text])
    for token, log_probability in zip(tokens, tokens.log_probabilities, strict=True):
        probabilities = expected_mixture(forms, [0.6, 0.4], text)
        assert token.id == probabilities.argmax()
        assert log_probability == pytest.approx(np.log(probabilities[token.id]), abs=1e-5)
        text = [*text, token.id]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.2, top_k=9, top_p=0.9, repetition_penalty=1.1)]
)
def test_a_batch_gives_the_single_results(members, sampling):
    prompts = [[3, 7, 1, 1, 9], [5], [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2], [15, 0]]
    mixture = ensemble(members, [0.5, 0.5])
    together = run(mixture, prompts, sampling, seeds=[4, 5, 6, 7], eos=[12], max_new_tokens=20)
    alone = [
        run(mixture, [prompt], sampling, seeds=[seed], eos=[12], max_new_tokens=20)[0]
        for prompt, seed in zip(prompts, [4, 5, 6, 7], strict=True)
    ]
    assert list(map(ids, together)) == list(map(ids, alone))
    assert len({len(text) for text in together}) > 1, "sequences must finish at different times for this to tell much"
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)


def test_members_that_weigh_nothing_are_not_evaluated(members):
    class Untouchable:
        member_count = 1

        def __getattr__(self, name):
            raise AssertionError("evaluated")

    mixture = ensemble([members[0], Untouchable()], [1.0, 0.0])
    assert ids(run(mixture, [[3]])[0]) == ids(run(ensemble([members[0]], [1.0]), [[3]])[0])


@pytest.mark.parametrize("combine", ["linear", "log-linear"])
def test_identical_members_are_the_member(forms, members, load, combine):
    twins = ensemble([members[0], load(forms[0])], [0.2, 0.8], combine)
    assert ids(run(twins, [[3, 4]])[0]) == ids(run(ensemble([members[0]], [1.0]), [[3, 4]])[0])


def test_log_linear_is_the_normalised_geometric_mean(forms, members):
    mixture = ensemble(members, [0.6, 0.4], "log-linear")
    product = np.exp(sum(w * form.log_probabilities([3, 7])[-1] for w, form in zip([0.6, 0.4], forms, strict=True)))
    np.testing.assert_allclose(
        np.exp(next_token_log_probabilities(mixture, [3, 7])), product / product.sum(), rtol=1e-4
    )


def test_finish_reasons(members):
    mixture = ensemble(members, [0.5, 0.5])
    (long,) = run(mixture, [[3, 7]], max_new_tokens=5)
    assert [token.finish_reason for token in long] == [None] * 4 + ["length"]
    stop = long[2].id
    (short,) = run(mixture, [[3, 7]], max_new_tokens=5, eos=[stop])
    assert short[-1].id == stop
    assert short[-1].finish_reason == "stop"
    assert ids(short) == ids(long)[: len(short)]


def test_the_context_ends_a_text(members):
    """Every token but the last is read, so a prompt that fills the context still gets one."""
    (tokens,) = run(ensemble(members, [0.5, 0.5]), [[1, 2, 3]], context=6, max_new_tokens=50)
    assert len(tokens) == 4
    assert tokens[-1].finish_reason == "length"
    (tokens,) = run(ensemble(members, [0.5, 0.5]), [[1, 2, 3]], context=3, max_new_tokens=50)
    assert len(tokens) == 1


def test_a_sequence_can_be_finished_from_outside(members):
    decoding = StaticBatch(
        ensemble(members, [0.5, 0.5]), [[1], [2]], Sampling(), seeds=[0, 0], max_new_tokens=3, context=50, eos=[]
    )
    decoding.step()
    decoding.finish(0)
    assert [token.sequence for token in decoding.step()] == [1]
    decoding.finish(1)
    assert decoding.step() == []


def test_the_repetition_penalty_covers_prompt_and_new_tokens(load):
    table = np.zeros((TOKENS, TOKENS), np.float32)
    table[:, [4, 5, 6]] = [3.0, 2.9, 2.8]
    member = load(ClosedForm(table))
    (tokens,) = run(ensemble([member], [1.0]), [[5]], Sampling(repetition_penalty=4.0), max_new_tokens=2)
    assert ids([*tokens]) == [4, 6]


def test_the_repetition_penalty_is_hugging_faces(load):
    """It was applied to log-probabilities, where a likely token's is about zero and cannot be made smaller."""
    logits = np.random.default_rng(3).normal(0, 6, (TOKENS, TOKENS)).astype(np.float32)
    member = load(ClosedForm(logits))
    prompt, penalty, expected = [5, 6], 1.7, []
    while len(expected) < 6:  # transformers' RepetitionPenaltyLogitsProcessor, greedy
        text = [*prompt, *expected]
        scores = logits[text[-1]].copy()
        seen = sorted(set(text))
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        expected.append(int(scores.argmax()))
    (tokens,) = run(ensemble([member], [1.0]), [prompt], Sampling(repetition_penalty=penalty), max_new_tokens=6)
    assert ids([*tokens]) == expected
    (plain,) = run(ensemble([member], [1.0]), [prompt], Sampling(), max_new_tokens=6)
    assert ids([*plain]) != expected
    first = logits[6] - np.log(np.exp(logits[6].astype(np.float64)).sum())
    assert tokens.log_probabilities[0] == pytest.approx(first[expected[0]], abs=1e-4)  # of the mixture as it is


def test_sampled_frequencies_are_the_mixture(forms, members):
    mixture = ensemble(members, [0.6, 0.4])
    texts = run(mixture, [[3, 7]] * 2_000, Sampling(temperature=1.0), seeds=list(range(2_000)), max_new_tokens=1)
    counts = np.bincount([text[0].id for text in texts], minlength=TOKENS)
    expected = 2_000 * expected_mixture(forms, [0.6, 0.4], [3, 7])
    assert (((counts - expected) ** 2) / expected).sum() < 37.7  # 99.9% point, 15 degrees of freedom


def test_logits_that_are_not_numbers_are_an_error(load):
    member = load(ClosedForm(np.full((TOKENS, TOKENS), np.nan, np.float32)))
    with pytest.raises(EdgemixError, match="not numbers"):
        run(ensemble([member], [1.0]), [[1]])
