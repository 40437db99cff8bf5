"""Recorded calls (CUDA graphs), through a provider's record that asks for them and runs on the CPU, which records none:
what is tested are shapes and numbers, and that nothing else is said.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.onnx_members import VOCABULARY, random_member, write_bundle, write_graph, write_stack

from edgemix.errors import EdgemixError
from edgemix.runtime import Mixture
from edgemix.runtime.graphs import cuda_graphs, decoder, shared_cache
from edgemix.runtime.graphs.decoder import FEW, DecoderGraph
from edgemix.runtime.graphs.providers import PROVIDERS, eager, run_options

if TYPE_CHECKING:
    from pathlib import Path

RECORDING = replace(PROVIDERS["cpu"], name="recording", captures=True)


class Session:
    """A session that notes the numbers that its calls are recorded by."""

    def __init__(self, real: Any, numbers: dict[int, int]) -> None:
        self._real, self._known, self.numbers = real, numbers, []
        self.error: Exception | None = None

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.numbers.append(self._known[id(options)])
        self._real.run_with_iobinding(binding, options)

    def io_binding(self) -> Any:
        return self._real.io_binding()


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, tuple[int, int]]]:
    """The shapes of the inputs of each call that can be recorded, in order."""
    found, real = [], decoder.CudaGraph

    def noted(binding, provider, shapes, *rest):
        found.append(dict(shapes))
        return real(binding, provider, shapes, *rest)

    monkeypatch.setattr(decoder, "CudaGraph", noted)
    return found


@pytest.fixture
def form():
    return random_member(3, padding=4)


@pytest.fixture
def recorded(form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecoderGraph:
    """A member whose calls are recorded; its caches grow from 8 places."""
    monkeypatch.setattr(shared_cache, "FIRST_CAPACITY", 8)
    made, kept = {}, []

    def noted(number):
        kept.append(options := run_options(number))
        made[id(options)] = number
        return options

    monkeypatch.setattr(cuda_graphs, "run_options", noted)
    monkeypatch.setattr(decoder, "run_options", noted)
    loaded = DecoderGraph.load(tmp_path / "m.onnx", write_graph(tmp_path / "m.onnx", form), RECORDING, threads=1)
    loaded._session = Session(loaded._session, made)
    return loaded


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 16, count)


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_a_shape_has_one_number_until_its_cache_moves(form, recorded, shapes):
    ids, cache = tokens(14), recorded.new_cache()
    for end in range(1, 15):
        same(recorded.extend(cache, ids[None, end - 1 : end]), form.logits(ids[:end])[-1:])
    # One place less than the cache has: of a single token some graphs write a second one.
    assert [shape["attention_mask"] for shape in shapes] == [(1, 7), (1, 15)]
    numbers = recorded._session.numbers
    first, second = numbers[1], numbers[-1]
    assert 0 < first < second
    # A first call is not recorded: it may be the only one. The cache of 8 places has room for a doubled token till 7.
    assert numbers == [-1, *[first] * 6, -1, *[second] * 6]


def test_shapes_and_caches_do_not_share_numbers(form, recorded):
    caches = recorded.new_cache(), recorded.new_cache()
    for cache in caches:
        for count in (1, 1, 2, 2):
            cache.rollback([0])
            same(recorded.extend_all(cache, [tokens(count)])[0], form.logits(tokens(count)))
    numbers = [number for number in recorded._session.numbers if number > 0]
    assert len(numbers) == len(set(numbers)) == 4


def test_prompts_are_not_recorded(form, recorded, shapes):
    ids = tokens(FEW + 1)
    for _ in range(3):
        same(recorded.extend(recorded.new_cache(), [ids]), form.logits(ids)[-1:])
    assert set(recorded._session.numbers) == {-1}
    assert not shapes


def test_what_a_cache_no_longer_holds_is_masked(form, recorded):
    """The mask is wider than the text: of what was taken back, nothing may shine through."""
    cache, ids = recorded.new_cache(), tokens(5)
    for token in tokens(6, seed=1):
        recorded.extend(cache, [[token]])
    cache.rollback([0])
    for end in range(1, 6):
        same(recorded.extend(cache, ids[None, end - 1 : end]), form.logits(ids[:end])[-1:])


def test_a_batch_of_unequal_rows(form, recorded):
    rows, cache = [tokens(9, seed=1), tokens(3, seed=2)], recorded.new_cache(2)
    recorded.extend(cache, [row[:-4] if len(row) > 4 else row[:1] for row in rows])
    cache.rollback([5, 1])
    for step in range(2):
        found = recorded.extend(cache, np.array([[rows[0][5 + step]], [rows[1][1 + step]]]))
        for row, length, logits in zip(rows, (6 + step, 2 + step), found, strict=True):
            same(logits, form.logits(row[:length])[-1])


@pytest.mark.parametrize("kind", ["growing", "stack"])
def test_other_graphs(kind, tmp_path, shapes):
    """Caches that are new tensors after each call cannot be recorded; several voices can."""
    forms = [random_member(seed, cache="growing" if kind == "growing" else "shared") for seed in (1, 2)]
    path = tmp_path / "g.onnx"
    config = write_stack(path, forms) if kind == "stack" else write_graph(path, forms[0])
    loaded = DecoderGraph.load(path, config, RECORDING, threads=1)
    cache, ids = loaded.new_cache(), tokens(6)
    for end in range(1, 7):
        parts = loaded.parts(loaded.extend(cache, ids[None, end - 1 : end]))
        for part, each in zip(parts, forms, strict=False):
            same(part, each.logits(ids[:end])[-1:])
    assert bool(shapes) == (kind == "stack")


def test_a_mixture_says_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "recording", RECORDING)
    monkeypatch.setattr(shared_cache, "FIRST_CAPACITY", 16)
    forms = {name: random_member(seed, tokens=VOCABULARY) for name, seed in (("a", 1), ("b", 2))}
    folder = write_bundle(tmp_path / "b", forms, student=random_member(3, tokens=VOCABULARY))
    prompts = ["to be or not to be, to be or not", "a", "x" * 40]

    def say(provider, **options):
        with Mixture.load(folder, provider, threads=1) as mixture:
            return [one.token_ids for one in mixture.generate(prompts, max_new_tokens=30, **options)] + [
                mixture.generate(prompt, max_new_tokens=30, **options).token_ids for prompt in prompts
            ]

    for options in ({}, {"weights": "adaptive"}, {"temperature": 1.0, "seed": 3}):
        assert say("recording", **options) == say("cpu", **options)


def test_memory_for_recordings_is_bounded(form, recorded, monkeypatch):
    recorded._numbers = iter([1, 2])
    for _ in range(4):
        cache, ids = recorded.new_cache(), tokens(4)
        for end in range(1, 5):
            same(recorded.extend(cache, ids[None, end - 1 : end]), form.logits(ids[:end])[-1:])
    assert recorded._session.numbers == [-1, 1, 1, 1, -1, 2, 2, 2, *[-1] * 8]


def test_a_call_that_fails_can_be_made_again(form, recorded):
    """Growing out of its buffers, a cache kept what had been recorded for those that were gone."""
    ids, cache = tokens(9), recorded.new_cache()
    for token in ids[:7]:
        recorded.extend(cache, [[token]])
    recorded._session.error = RuntimeError("no memory")
    with pytest.raises(EdgemixError, match="failed on recording: no memory"):
        recorded.extend(cache, ids[None, 7:8])
    recorded._session.error = None
    for end in (8, 9):
        same(recorded.extend(cache, ids[None, end - 1 : end]), form.logits(ids[:end])[-1:])
    same(recorded.extend(recorded.new_cache(), [tokens(2)]), form.logits(tokens(2))[-1:])


def test_the_record_is_cudas_with_graphs():
    graphs, cuda = PROVIDERS["cuda-graphs"], PROVIDERS["cuda"]
    assert dict(graphs.options) == {**dict(cuda.options), "enable_cuda_graph": "1"}
    assert replace(graphs, name="cuda", options=cuda.options, captures=False) == cuda
    assert [row.name for row in PROVIDERS.values() if row.captures] == ["cuda-graphs"]
    assert eager(graphs) == eager(cuda) == cuda
