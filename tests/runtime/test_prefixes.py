"""Texts that begin alike are read once, and say what they would say if they were read whole."""

import numpy as np
import pytest
from onnx_members import VOCABULARY, random_member, write_bundle

from edgemix.errors import InputError
from edgemix.runtime import Mixture
from edgemix.runtime.member import Member
from edgemix.runtime.prefixes import LEAST, PrefixCache

INTRODUCTION = "You are an owl, and sit on a mat in the wood. "


@pytest.fixture
def load(tmp_path):
    forms = {
        "a": random_member(1, tokens=VOCABULARY, padding=6),
        "b": random_member(2, tokens=VOCABULARY, padding=14, cache="growing"),
    }
    folder = write_bundle(tmp_path / "bundle", forms, weights={"a": 0.6, "b": 0.4})
    return lambda **options: Mixture.load(folder, provider="cpu", threads=1, **options)


@pytest.fixture
def read(monkeypatch):
    """Counts the tokens that graphs read."""
    counts, real = [], Member._run
    monkeypatch.setattr(
        Member, "_run", lambda self, cache, ids, *a, **o: counts.append(ids.size) or real(self, cache, ids, *a, **o)
    )
    return counts


OPTIONS = [{}, {"weights": "adaptive"}, {"combine": "log-linear"}, {"weights": {"a": 1.0}}]


@pytest.mark.parametrize("first", OPTIONS)
@pytest.mark.parametrize("second", OPTIONS)
def test_what_follows_is_the_same(load, first, second):
    plain = load(prefix_bytes=0)
    mixture = load()
    for prompt, options in (("Hello.", first), ("Hello? Yes.", second), ("Hello? Yes.", first), ("Hello", second)):
        found, expected = (
            each.generate(INTRODUCTION + prompt, max_new_tokens=20, **options) for each in (mixture, plain)
        )
        assert found.token_ids == expected.token_ids
        np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, atol=1e-4)
    assert len(mixture.prefixes)
    assert not len(plain.prefixes)


@pytest.mark.parametrize("weights", [None, "adaptive"])
def test_what_was_read_is_not_read_again(load, read, weights):
    mixture = load()
    mixture.generate(INTRODUCTION, max_new_tokens=8, weights=weights)
    read.clear()
    mixture.generate(INTRODUCTION + "Hi", max_new_tokens=1, weights=weights)
    assert sum(read) <= 2 * 3


def test_a_server_shares_what_was_read(load, read):
    mixture = load()
    with mixture.serve() as server:
        first = server.submit(INTRODUCTION, max_new_tokens=1).result()
        read.clear()
        second = server.submit(INTRODUCTION + "!", max_new_tokens=1).result()
    assert sum(read) <= 2 * 2
    plain = load(prefix_bytes=0)
    for prompt, found in ((INTRODUCTION, first), (INTRODUCTION + "!", second)):
        assert found.token_ids == plain.generate(prompt, max_new_tokens=1).token_ids


def test_memory_is_bounded_and_the_oldest_goes(load):
    mixture = load(prefix_bytes=700_000)
    for letter in "abcdefgh":
        mixture.generate(letter * 3 * LEAST, max_new_tokens=4)
        assert mixture.prefixes.bytes <= 700_000
    assert 2 <= len(mixture.prefixes) < 16
    mixture.close()
    assert not len(mixture.prefixes)


def test_a_short_beginning_is_not_worth_it(load):
    mixture = load()
    mixture.generate("abc", max_new_tokens=4)
    assert not len(mixture.prefixes)


def test_room_is_no_negative_number(load):
    with pytest.raises(InputError, match="prefix_bytes"):
        load(prefix_bytes=-1)
    assert PrefixCache(0).bytes == 0
