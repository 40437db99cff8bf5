"""Weights that follow the text: the arithmetic, and that every way of reading gives the same ones."""

import itertools

import numpy as np
import pytest
from helpers.onnx_members import random_member, saying

from edgemix.errors import InputError
from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.decoding.static_batch import StaticBatch
from edgemix.runtime.mixing.adaptive import PERIOD, AdaptivePrior, Posterior, adaptive_targets
from edgemix.runtime.mixing.ensemble import Ensemble

NAMES = ("a", "b", "c")
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
TOKENS = 16


@pytest.fixture
def own():
    return np.log(np.random.default_rng(0).dirichlet(np.ones(9), size=(3, 100)).max(-1))


def test_it_begins_with_the_prior():
    assert AdaptivePrior.of(NAMES, WEIGHTS, {}).weights.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_domains_share_a_half():
    experts = AdaptivePrior.of(NAMES, WEIGHTS, {"x": {"a": 0.9, "b": 0.1}, "y": {"c": 1.0}})
    np.testing.assert_allclose(experts.weights, [0.475, 0.175, 0.35])
    assert experts.components.shape == (5, 3)


def test_a_member_without_weight_never_speaks():
    experts = AdaptivePrior.of(NAMES, {"a": 0.5, "b": 0.5, "c": 0.0}, {})
    posterior = Posterior(experts)
    posterior.observe(np.log([[0.1] * 50, [0.1] * 50, [0.9] * 50]))
    assert posterior.weights[2] == 0


def test_the_posterior_is_that_of_every_path_of_experts(own):
    """Fixed share is Bayes' rule over all sequences of experts, of which each may follow each."""
    experts = AdaptivePrior.of(NAMES, WEIGHTS, {"x": {"a": 0.4, "b": 0.6}})
    said, prior, share = experts.components @ np.exp(own[:, :4]), experts.probabilities, experts.share
    count = len(prior)
    step = (1 - share) * np.eye(count) + share * prior
    joint = np.zeros(count)
    for path in np.ndindex(*[count] * 5):
        chance = prior[path[0]]
        for t, (here, there) in enumerate(itertools.pairwise(path)):
            chance *= said[here, t] * step[here, there]
        joint[path[-1]] += chance
    posterior = Posterior(experts)
    posterior.observe(own[:, :4])
    np.testing.assert_allclose(posterior.weights, joint / joint.sum() @ experts.components)


def test_a_text_that_switches_is_followed():
    good, bad = np.log(0.5), np.log(0.05)
    own = np.array([[good] * 200 + [bad] * 200, [bad] * 200 + [good] * 200])
    mixed, path = adaptive_targets(own, AdaptivePrior.of(("a", "b"), {"a": 0.5, "b": 0.5}, {}))
    assert path[0, 150] > 0.98
    assert path[1, -50] > 0.98
    assert mixed.mean() > np.log(0.45)
    assert own.mean(1).max() < np.log(0.2)


def test_weights_change_every_period_only(own):
    _, path = adaptive_targets(own, AdaptivePrior.of(NAMES, WEIGHTS, {}), period=PERIOD)
    changes = np.flatnonzero(np.abs(np.diff(path[0])) > 0) + 1
    assert changes.tolist() == list(range(PERIOD, 100, PERIOD))


def test_an_impossible_token_tells_nothing():
    posterior = Posterior(AdaptivePrior.of(("a", "b"), {"a": 0.5, "b": 0.5}, {}))
    posterior.observe(np.full((2, 3), -np.inf))
    assert posterior.weights.tolist() == [0.5, 0.5]


def test_scores_follow_the_text(pair, pair_forms):
    text = "fox and hen " * 20
    score = pair.score(text, weights="adaptive")
    own = np.stack(
        [form.log_probabilities(score.token_ids)[range(len(score.token_ids) - 1), score.token_ids[1:]]
         for form in pair_forms.values()]
    )  # fmt: skip
    expected, _ = adaptive_targets(own, AdaptivePrior.of(pair.members, pair.weights, pair.manifest.weights.domains))
    np.testing.assert_allclose(score.log_probabilities, expected, atol=1e-3)


def test_a_batch_gives_the_single_results(load):
    members = [load(random_member(1)), load(random_member(2, cache="growing", padding=3))]
    experts = AdaptivePrior.of(("a", "b"), {"a": 0.5, "b": 0.5}, {})
    mixture = Ensemble.of(members, experts.weights, "linear", TOKENS, experts)
    prompts = [[3, 7, 1, 1, 9], [5], [2] * 12, [15, 0]]

    def run(some):
        decoding = StaticBatch(
            mixture, some, Sampling(), seeds=[0] * len(some), max_new_tokens=50, context=200, eos=[12]
        )
        texts = [[] for _ in some]
        while tokens := decoding.step():
            for token in tokens:
                texts[token.sequence].append(token.id)
        return texts, [decoding.log_probabilities(i) for i in range(len(some))]

    together, logs = run(prompts)
    assert len({len(text) for text in together}) > 1, "sequences must finish at different times for this to tell much"
    for prompt, text, log in zip(prompts, together, logs, strict=True):
        (alone,), (other,) = run([prompt])
        assert text == alone
        np.testing.assert_allclose(log, other, atol=1e-4)


def test_the_prompt_counts(mixture_of):
    """Both members go on where their own alphabet ends; the prompt is in one's."""
    mixture = mixture_of({"low": saying("abcdefgh"), "high": saying("dcba")}, weights={"low": 0.5, "high": 0.5})
    assert mixture.generate("abcd", weights="adaptive", max_new_tokens=3).text == "efg"
    assert mixture.generate("dc", weights="adaptive", max_new_tokens=3).text == "ba"


def test_they_are_those_of_the_linear_mixture(pair):
    with pytest.raises(InputError, match="linear"):
        pair.generate("x", weights="adaptive", combine="log-linear")


def test_a_bundle_whose_weights_are_adaptive_answers_so_unless_a_call_says_otherwise(mixture_of):
    members = {"a": saying("abcdefgh"), "b": saying("dcba")}
    domains = {"x": {"a": 1.0, "b": 0.0}, "y": {"a": 0.0, "b": 1.0}}
    text = "dcb"
    mixture = mixture_of(members, weights={"a": 0.6, "b": 0.4}, domains=domains, adaptive=True)

    def everywhere(**options):
        with mixture.serve(most=2) as server:
            return (
                mixture.score(text, **options).log_probabilities.tolist(),
                mixture.next_token_distribution(text, **options).tolist(),
                mixture.generate(text, attribution=True, max_new_tokens=3, **options).responsibilities.tolist(),
                mixture.generate([text, "ab"], attribution=True, max_new_tokens=3, **options)[
                    0
                ].responsibilities.tolist(),
                server.submit(text, attribution=True, max_new_tokens=3, **options).result().responsibilities.tolist(),
            )

    assert everywhere() == everywhere(weights="adaptive")
    fixed = everywhere(weights="fixed")
    assert fixed == everywhere(weights={"a": 0.6, "b": 0.4})
    assert all(one != other for one, other in zip(everywhere(), fixed, strict=True))
    assert mixture.score(text, combine="log-linear").log_probabilities == pytest.approx(
        mixture.score(text, weights="fixed", combine="log-linear").log_probabilities
    )


def test_a_domain_may_be_called_fixed(mixture_of):
    mixture = mixture_of(
        {"a": saying("ab"), "b": saying("cd")},
        weights={"a": 0.6, "b": 0.4},
        domains={"fixed": {"a": 0.0, "b": 1.0}},
    )
    assert mixture.ensemble("fixed").weights.tolist() == [1.0]
