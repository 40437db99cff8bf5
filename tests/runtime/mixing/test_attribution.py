"""Which member spoke: each one's share in every token, by the closed form."""

import numpy as np
import pytest
from helpers.onnx_members import saying

from edgemix.errors import InputError

PROMPT = "Who speaks?"


def by_hand(forms, weights, prompt, completion):
    """Log-probabilities and responsibilities [tokens, members]."""
    ids = [*prompt.encode(), *completion.token_ids]
    new = range(len(prompt), len(ids))
    own = np.stack([[form.log_probabilities(ids[:t])[-1][ids[t]] for t in new] for form in forms], axis=1)
    joint = np.exp(own) * weights
    return own, joint / joint.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_shares_are_the_posterior_of_the_member(pair, pair_forms, speculation):
    found = pair.generate(PROMPT, max_new_tokens=12, attribution=True, speculation=speculation)
    own, shares = by_hand(pair_forms.values(), [0.7, 0.3], PROMPT, found)
    np.testing.assert_allclose(found.member_logprobs, own, atol=1e-4)
    np.testing.assert_allclose(found.responsibilities, shares, atol=1e-4)


def test_it_is_the_same_however_texts_are_generated(pair):
    options = {"max_new_tokens": 40, "attribution": True, "weights": "adaptive"}
    alone = pair.generate(PROMPT, **options)
    batch = pair.generate([PROMPT, "x"], **options)[0]
    with pair.serve() as server:
        served = server.submit(PROMPT, **options).result()
    for other in (batch, served):
        assert other.token_ids == alone.token_ids
        np.testing.assert_allclose(other.member_logprobs, alone.member_logprobs, atol=1e-4)
        np.testing.assert_allclose(other.responsibilities, alone.responsibilities, atol=1e-4)
    np.testing.assert_allclose(alone.responsibilities.sum(axis=1), 1)


def test_chunks_have_the_pieces(pair):
    chunks = list(pair.stream(PROMPT, max_new_tokens=20, attribution=True))
    whole = chunks[-1].completion
    for name in ("responsibilities", "member_logprobs"):
        pieces = [getattr(chunk, name) for chunk in chunks]
        assert all(len(piece) == len(chunk.token_ids) for piece, chunk in zip(pieces, chunks, strict=True))
        np.testing.assert_array_equal(np.concatenate(pieces), getattr(whole, name))


def test_a_member_without_weight_has_no_share(pair):
    found = pair.generate(PROMPT, max_new_tokens=5, attribution=True, weights={"growing": 1.0})
    np.testing.assert_array_equal(found.responsibilities, [[0, 1]] * 5)
    assert np.isnan(found.member_logprobs[:, 0]).all()
    assert np.isfinite(found.member_logprobs[:, 1]).all()
    with pair.serve() as server:
        served = server.submit(PROMPT, max_new_tokens=5, attribution=True, weights={"growing": 1.0}).result()
    np.testing.assert_array_equal(np.isnan(served.member_logprobs), np.isnan(found.member_logprobs))


def test_it_tells_who_knew(mixture_of):
    mixture = mixture_of({"fox": saying("a fox"), "owl": saying("an owl")}, weights={"fox": 0.5, "owl": 0.5})
    found = mixture.generate("a", attribution=True, choices=[" fox", "n owl"])
    assert (found.responsibilities.argmax(axis=1) == (0 if found.text == " fox" else 1))[:4].all()


def test_without_asking_nothing_is_told(pair):
    found = pair.generate(PROMPT, max_new_tokens=3)
    assert found.responsibilities is None
    assert found.member_logprobs is None


def test_products_have_no_shares(pair):
    with pytest.raises(InputError, match="log-linear"):
        pair.generate(PROMPT, attribution=True, combine="log-linear")
