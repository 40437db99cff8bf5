"""Texts that begin alike are read once, and say what they would say if they were read whole."""

import hashlib
import json

import numpy as np
import pytest
from helpers.onnx_members import VOCABULARY, random_member, write_bundle
from safetensors import safe_open
from safetensors.numpy import save

from edgemix.errors import InputError
from edgemix.runtime import Mixture
from edgemix.runtime.sequences.prefix_cache import LEAST, PrefixCache

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
def read(graph_calls):
    """Counts the tokens that graphs read."""
    return graph_calls


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


@pytest.mark.parametrize(
    "options", [{"speculation": "off"}, {"temperature": 1.0, "seed": 3}, {"speculation": "off", "weights": "adaptive"}]
)
def test_every_way_of_decoding_uses_what_was_read(load, read, options):
    """The prefix cache served speculative decoding only."""
    mixture, plain = load(), load(prefix_bytes=0)
    mixture.generate(INTRODUCTION, max_new_tokens=1, **options)
    read.clear()
    found = mixture.generate(INTRODUCTION + "Hi", max_new_tokens=1, **options)
    assert sum(read) <= 2 * 3
    assert found.token_ids == plain.generate(INTRODUCTION + "Hi", max_new_tokens=1, **options).token_ids


def test_a_list_of_prompts_reads_their_common_beginning_once(load, read):
    mixture, plain = load(), load(prefix_bytes=0)
    prompts = [INTRODUCTION + end for end in ("Hi", "Ho", "Hm")]
    found = mixture.generate(prompts, max_new_tokens=1)
    assert sum(read) <= 2 * (len(INTRODUCTION) + 2 + 2 * 3)
    expected = plain.generate(prompts, max_new_tokens=1)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]


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


@pytest.fixture
def saved(load, tmp_path):
    with load() as mixture:
        mixture.generate(INTRODUCTION, max_new_tokens=8, weights="adaptive")
        mixture.save_prefixes(tmp_path / "prefixes")
        assert len(mixture.prefixes) == 2
    return tmp_path / "prefixes"


def test_another_process_goes_on_with_what_was_saved(load, saved, read):
    plain, mixture = load(prefix_bytes=0), load()
    expected = plain.generate(INTRODUCTION + "Hi", max_new_tokens=9, weights="adaptive")
    assert mixture.load_prefixes(saved) == len(mixture.prefixes) == 2
    read.clear()
    found = mixture.generate(INTRODUCTION + "Hi", max_new_tokens=9, weights="adaptive")
    assert found.token_ids == expected.token_ids
    assert sum(read) < len(INTRODUCTION)


def test_only_as_much_as_there_is_room_for(load, saved):
    mixture = load(prefix_bytes=400_000)
    mixture.load_prefixes(saved)
    assert 0 < mixture.prefixes.bytes <= 400_000


def test_what_has_no_room_leaves_the_others(load, tmp_path):
    with load() as mixture:
        mixture.generate("ab" * 700, max_new_tokens=1, weights={"a": 1.0})
        mixture.save_prefixes(tmp_path / "long")
    small = load(prefix_bytes=400_000)
    small.generate("ab" * LEAST, max_new_tokens=1, weights={"a": 1.0})
    assert len(small.prefixes) == 1
    small.load_prefixes(tmp_path / "long")
    assert len(small.prefixes) == 1


def test_texts_of_other_graphs_are_passed_over(load, saved, tmp_path):
    other = write_bundle(tmp_path / "other", {"a": random_member(3, tokens=VOCABULARY, padding=6)}, weights={"a": 1.0})
    with Mixture.load(other, provider="cpu", threads=1) as mixture:
        assert mixture.load_prefixes(saved) == len(mixture.prefixes) == 0


@pytest.mark.parametrize("bit", [1, 0x80])
@pytest.mark.parametrize("at", [0, 40, 2_000, -1])
def test_a_damaged_file_is_refused(load, saved, at, bit):
    content = bytearray(saved.read_bytes())
    content[at] ^= bit
    saved.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load().load_prefixes(saved)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:33], lambda b: b""])
def test_a_file_of_another_size_is_refused(load, saved, change):
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(InputError, match="damaged"):
        load().load_prefixes(saved)


@pytest.mark.parametrize("number", [1 << 62, -1, 0])
def test_a_number_of_tokens_that_lies_is_refused(load, saved, number):
    content = saved.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["0.tokens"]["shape"] = [number]
    encoded = json.dumps(header).encode()
    saved.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])
    with pytest.raises(InputError, match="damaged"):
        load().load_prefixes(saved)


@pytest.mark.parametrize("change", [
    {"0.tokens": np.zeros((1, 4), np.int64)},
    {"0.tokens": np.empty(0, np.int64)},
    {"0.tokens": np.full(54, VOCABULARY, np.int64)},
    {"0.log_probabilities": np.zeros((2, 54))},
    {"0.state.0": np.zeros((1, 54, 1), np.float64)},
    {"0.state.0": np.full((1, 54, 272), np.nan, np.float32)},
    {"0.state.1": np.full((1, 54, 272), np.inf, np.float32)},
    {"0.log_probabilities": np.full((1, 54), 0.1)},
])  # fmt: skip
def test_tensors_that_do_not_fit_the_graph_are_refused(load, saved, change):
    """Also where their checksum is right."""
    with safe_open(saved, framework="np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors |= change
    header = json.loads(metadata["edgemix"])
    digest = hashlib.sha256()
    names = ["0.tokens", "0.log_probabilities", *(f"0.state.{slot}" for slot in range(len(tensors)))]
    for array in (tensors[name] for name in names if name in tensors):
        digest.update(f"{array.dtype.name} {array.shape};".encode() + array.tobytes())
    header["texts"][0]["sha256"] = digest.hexdigest()
    encoded = json.dumps(header)
    sealed = {"edgemix": encoded, "sha256": hashlib.sha256(encoded.encode()).hexdigest()}
    saved.write_bytes(save(tensors, sealed))
    with pytest.raises(InputError, match="damaged"):
        load().load_prefixes(saved)


@pytest.mark.parametrize("header", [
    {"texts": [{"graph": "x", "sha256": ""}] * 1_001},
    {"messages": [{"role": "a" * (17 << 20)}]},
    {"messages": [1]},
    {"texts": [{"graph": 1}]},
])  # fmt: skip
def test_headers_are_bounded(load, saved, header):
    encoded = json.dumps(header)
    sealed = {"edgemix": encoded, "sha256": hashlib.sha256(encoded.encode()).hexdigest()}
    saved.write_bytes(save({"0.tokens": np.zeros(1, np.int64)}, sealed))
    with pytest.raises(InputError, match="damaged"):
        load().load_prefixes(saved)


def test_a_file_of_others_is_refused(load, tmp_path):
    (tmp_path / "others.safetensors").write_bytes(save({"weight": np.zeros(3)}))
    with pytest.raises(InputError, match="damaged"):
        load().load_prefixes(tmp_path / "others.safetensors")


def test_there_must_be_a_file(load, tmp_path):
    with pytest.raises(InputError, match="no file"):
        load().load_prefixes(tmp_path / "nothing")
