"""Members against the closed form of their graphs: however tokens are read, the logits are the same."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers.onnx_members import random_member, write_graph

from edgemix.errors import BundleError, InputError
from edgemix.runtime.graphs import shared_cache
from edgemix.runtime.graphs.decoder import DecoderGraph

KINDS = ("shared", "growing")


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 16, count)


@pytest.fixture(params=[*((kind, True) for kind in KINDS), ("shared", False)])
def form(request):
    cache, keeps = request.param
    return random_member(3, padding=4, cache=cache, keeps=keeps)


@pytest.fixture
def member(form, load):
    return load(form)


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_prefill_gives_the_last_logits(form, member):
    ids = tokens(9)
    same(member.extend(member.new_cache(), [ids]), form.logits(ids)[-1:])


def test_prefill_makes_no_other_logits(form, member, monkeypatch):
    cache, sizes, real = member.new_cache(), [], DecoderGraph.prepare_call
    monkeypatch.setattr(
        DecoderGraph, "prepare_call", lambda self, cache, *size: sizes.append(size) or real(self, cache, *size)
    )
    member.extend(cache, [tokens(9)])
    assert sizes == [(1, 9, 1 if form.keeps else 9)]
    same(member.extend_all(cache, [tokens(3)])[0], form.logits([*tokens(9), *tokens(3)])[-3:])


def test_extend_all_gives_every_position(form, member):
    ids = tokens(9)
    same(member.extend_all(member.new_cache(), [ids])[0], form.logits(ids))


def test_cached_equals_uncached(form, member):
    ids = tokens(12)
    cache = member.new_cache()
    member.extend(cache, [ids[:5]])
    for end in range(6, 13):
        same(member.extend(cache, ids[None, end - 1 : end]), form.logits(ids[:end])[-1:])


def test_chunked_prefill_equals_whole(form, member):
    member.chunk = 4
    ids = tokens(19)
    cache = member.new_cache()
    same(member.extend(cache, [ids]), form.logits(ids)[-1:])
    assert cache.lengths.tolist() == [19]


def test_chunked_prefill_of_rows_of_equal_length(form, member):
    member.chunk = 6
    rows = [tokens(9, 1), tokens(9, 2)]
    same(member.extend(member.new_cache(2), rows), [form.logits(row)[-1] for row in rows])


def test_several_tokens_after_a_past(form, member):
    """What a verification of drafted tokens does."""
    ids = tokens(12)
    cache = member.new_cache()
    member.extend(cache, [ids[:5]])
    same(member.extend_all(cache, [ids[5:12]])[0], form.logits(ids)[5:])


def test_ragged_batch_equals_single_sequences(form, member):
    member.chunk = 8
    rows = [tokens(11, 1), tokens(1, 2), tokens(20, 3)]
    cache = member.new_cache(3)
    same(member.extend(cache, rows), [form.logits(row)[-1] for row in rows])
    for step in range(3):
        new = tokens(3, 10 + step)
        rows = [np.append(row, token) for row, token in zip(rows, new, strict=True)]
        same(member.extend(cache, new[:, None]), [form.logits(row)[-1] for row in rows])
    assert cache.lengths.tolist() == [14, 4, 23]


def test_ragged_extension_of_a_batch(form, member):
    rows, more = [tokens(6, 1), tokens(2, 2)], [tokens(1, 3), tokens(5, 4)]
    cache = member.new_cache(2)
    member.extend(cache, rows)
    logits = member.extend_all(cache, more)
    for row, new, actual in zip(rows, more, logits, strict=True):
        same(actual, form.logits([*row, *new])[len(row) :])


def test_rollback_and_extension_equals_a_fresh_cache(form, member):
    rows = [tokens(9, 1), tokens(6, 2)]
    cache = member.new_cache(2)
    member.extend(cache, rows)
    cache.rollback([4, 6])
    new = tokens(2, 3)
    expected = [form.logits([*rows[0][:4], new[0]])[-1], form.logits([*rows[1], new[1]])[-1]]
    same(member.extend(cache, new[:, None]), expected)


def test_rollback_to_nothing(form, member):
    cache = member.new_cache()
    member.extend(cache, [tokens(9)])
    cache.rollback([0])
    ids = tokens(5, 1)
    same(member.extend_all(cache, [ids])[0], form.logits(ids))


def test_rollback_never_lengthens(member):
    cache = member.new_cache()
    member.extend(cache, [tokens(3)])
    cache.rollback([100])
    assert cache.lengths.tolist() == [3]


def test_rows_can_leave_a_batch(form, member):
    rows = [tokens(7, 1), tokens(3, 2), tokens(5, 3)]
    cache = member.new_cache(3)
    member.extend(cache, rows)
    cache.select([0, 2])
    new = tokens(2, 4)
    expected = [form.logits([*rows[0], new[0]])[-1], form.logits([*rows[2], new[1]])[-1]]
    same(member.extend(cache, new[:, None]), expected)


def test_forward_pads_on_the_right(form, member):
    rows = [tokens(7, 1), tokens(2, 2)]
    for actual, row in zip(member.forward(rows), rows, strict=True):
        same(actual, form.logits(row))


def test_growing_over_the_first_capacity(form, member, monkeypatch):
    """The shared cache starts small and doubles; nothing read before may be lost."""
    monkeypatch.setattr(shared_cache, "FIRST_CAPACITY", 4)
    rows = [tokens(3, 1), tokens(2, 2)]
    cache = member.new_cache(2)
    member.extend(cache, rows)
    for step in range(30):
        new = tokens(2, step)
        rows = [np.append(row, token) for row, token in zip(rows, new, strict=True)]
        same(member.extend(cache, new[:, None]), [form.logits(row)[-1] for row in rows])


def test_a_shared_cache_takes_memory_only_as_it_is_used(load):
    member = load(random_member(0, context=1 << 24))
    cache = member.new_cache()
    assert cache.capacity == 0
    member.extend(cache, [tokens(10)])
    assert cache.capacity == shared_cache.FIRST_CAPACITY
    member.extend(cache, [tokens(shared_cache.FIRST_CAPACITY)])
    assert cache.capacity == 2 * shared_cache.FIRST_CAPACITY
    cache.free()
    assert cache.capacity == 0


def test_a_shared_cache_never_exceeds_the_context(load):
    member = load(random_member(0, context=20))
    cache = member.new_cache()
    member.extend(cache, [tokens(3)])
    assert cache.capacity == 21  # attention doubles a last token


def test_the_context_is_a_limit(load, form):
    member = load(replace(form, context=8))
    cache = member.new_cache()
    member.extend(cache, [tokens(8)])
    with pytest.raises(InputError, match="context"):
        member.extend(cache, [tokens(1)])


def test_the_callers_rows_are_checked(member):
    with pytest.raises(ValueError, match="rows"):
        member.extend(member.new_cache(2), [tokens(3)])
    with pytest.raises(ValueError, match="rows"):
        member.extend(member.new_cache(2), [tokens(3), tokens(0)])


def test_the_chunk_bounds_the_logits(load):
    assert load(random_member(0)).chunk == 256
    wide = random_member(0)
    wide = replace(wide, table=np.pad(wide.table, ((0, 0), (0, 300_000))))
    member = load(wide)
    assert member.chunk * member.vocabulary * 4 <= 64 << 20


def test_half_precision_graphs_give_float32_logits(form, load):
    form = replace(form, dtype="float16")
    member = load(form)
    rows = [tokens(7, 1), tokens(3, 2)]
    cache = member.new_cache(2)
    logits = member.extend(cache, rows)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, [form.logits(row)[-1] for row in rows], atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2}, "no input past_key_values.1.key"),
        ({"vocabulary": 99}, "vocabulary 99"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_a_graph_that_is_not_as_the_manifest_says_is_refused(tmp_path, form, change, message):
    graph = tmp_path / "model.onnx"
    config = write_graph(graph, form)
    with pytest.raises(BundleError, match=message):
        DecoderGraph.load(
            graph, type(config)(**{name: getattr(config, name) for name in config.__struct_fields__} | change)
        )


def test_absurd_sizes_are_refused_before_they_are_allocated(tmp_path):
    graph = tmp_path / "model.onnx"
    config = write_graph(graph, random_member(0))
    model = onnx.load(graph)
    for tensor in (*model.graph.input, *model.graph.output):
        if "0." in tensor.name:
            tensor.type.tensor_type.shape.dim[1].dim_value = 1 << 40
    onnx.save(model, graph)
    with pytest.raises(BundleError, match="1099511627776 heads"):
        DecoderGraph.load(graph, config)


def test_an_input_that_nobody_feeds_is_refused(tmp_path, form):
    graph = tmp_path / "model.onnx"
    config = write_graph(graph, form)
    model = onnx.load(graph)
    model.graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, ["batch"]))
    onnx.save(model, graph)
    with pytest.raises(BundleError, match="token_type_ids is unknown"):
        DecoderGraph.load(graph, config)


def test_rows_join_and_leave(form, member):
    """As many as there are places, and more; each row goes on as if it were alone."""
    texts = [tokens(5), tokens(9, seed=1), tokens(3, seed=2), tokens(7, seed=3)]
    cache, alive = member.new_cache(0), []

    def step(extra):
        new = [extra + text for text in alive]
        logits = member.extend(cache, [[number % 16] for number in new])
        for place, number in enumerate(new):
            texts_of[alive[place]].append(number % 16)
            same(logits[place], form.logits(texts_of[alive[place]])[-1])

    texts_of = {}
    for number, text in enumerate(texts):
        row = member.new_cache()
        member.extend(row, [text])
        cache.append(row)
        texts_of[number] = list(text)
        alive.append(number)
        step(3)
    for leaving in (1, 0):
        cache.drop(leaving)
        alive[leaving] = alive[-1]
        alive.pop()
        for extra in range(200):  # beyond the first capacity
            step(extra)


def test_a_growing_cache_leaves_no_state_in_bindings(load):
    member = load(random_member(3, cache="growing"))
    cache = member.new_cache()
    for count in (5, 1, 1, 3):
        member.extend(cache, [tokens(count)])
    assert list(cache.calls) == [None]


def test_rows_of_a_batch_end_with_a_chunk_of_one_token(load, monkeypatch):
    """A single token is written doubled: a row's last chunk needed a place more than the batch had made room for, and
    the row moved out of the batch's buffers, or wrote behind them.
    """
    monkeypatch.setattr(shared_cache, "FIRST_CAPACITY", 16)
    form = random_member(3)
    member = load(form)
    member.chunk = 3
    cache, prompts = member.new_cache(2), [tokens(16, seed=1), tokens(4, seed=2)]
    same(member.extend(cache, prompts), np.stack([form.logits(prompt)[-1] for prompt in prompts]))
    found = member.extend(cache, np.array([[5], [6]]))
    same(found, np.stack([form.logits([*prompt, token])[-1] for prompt, token in zip(prompts, (5, 6), strict=True)]))
