"""A graph's logits for a token are the same to the last bit alone, within its text, and among other texts."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers.tiny_models import tiny_model

from edgemix.export.graphs.decoder import export_graph
from edgemix.export.quantization import quantize
from edgemix.runtime.graphs.decoder import DecoderGraph

CONTEXT = 128
TEXTS = np.random.default_rng(0).integers(0, 96, (3, CONTEXT))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request, tmp_path_factory):
    """The fp32 graph of a model with grouped heads, and with positions of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    size = {"n_positions" if request.param == "gpt2" else "max_position_embeddings": CONTEXT}
    return folder, export_graph(tiny_model(request.param, vocab_size=96, **size), folder, target="cpu").config


@pytest.fixture(params=["int4", "int8-dynamic"])
def member(made, request, tmp_path):
    folder, config = made
    if config.cache != "shared":
        pytest.skip(f"{config.exporter}: attention of this graph is not GroupQueryAttention, which doubling is for")
    quantize(folder / "model.onnx", tmp_path / "model.onnx", request.param, target="cpu", calibration=TEXTS.tolist())
    return DecoderGraph.load(tmp_path / "model.onnx", config)


def by_chunks(member, text, counts):
    cache, found = member.new_cache(), []
    for end, count in zip(np.cumsum(counts), counts, strict=True):
        found.append(member.extend_all(cache, [text[end - count : end]])[0].copy())
    return np.concatenate(found)


def test_a_single_token_has_the_logits_that_it_has_in_a_chunk(member):
    whole = by_chunks(member, TEXTS[0], [CONTEXT])
    assert np.isfinite(whole).all()
    for counts in ([1] * CONTEXT, [1, 2, 40, 1, 1, 16, 3, 1, 1, 61, 1], [CONTEXT - 1, 1]):
        np.testing.assert_array_equal(by_chunks(member, TEXTS[0], counts), whole)


def test_a_token_in_a_batch_has_the_logits_that_it_has_alone(member):
    lengths = [100, 7, 1]
    alone = [by_chunks(member, text[: length + 20], [length + 20]) for text, length in zip(TEXTS, lengths, strict=True)]
    cache = member.new_cache(3)
    member.extend(cache, [text[:length] for text, length in zip(TEXTS, lengths, strict=True)])
    for step in range(20):
        new = [text[length + step, None] for text, length in zip(TEXTS, lengths, strict=True)]
        for found, expected, length in zip(member.extend(cache, new), alone, lengths, strict=True):
            np.testing.assert_array_equal(found, expected[length + step])


def test_texts_of_several_lengths_are_padded(member):
    found = member.forward([TEXTS[0, :9], TEXTS[1, :30], TEXTS[2, :2]])
    for each, text in zip(found, TEXTS, strict=True):
        np.testing.assert_array_equal(each, by_chunks(member, text[: len(each)], [len(each)]))


def test_no_more_is_computed_than_attention(made, tmp_path):
    """Products read a single token once."""
    folder, _ = made
    quantize(folder / "model.onnx", tmp_path / "model.onnx", "int4", target="cpu")
    graph = ir.load(tmp_path / "model.onnx").graph
    doubled = [node for node in graph if node.name and ".rows." in node.name]
    readers = {use.node.op_type for node in doubled for use in node.outputs[0].uses()}
    assert readers <= {"GroupQueryAttention"}


def test_on_cuda_attention_stays_as_it_is(made, tmp_path):
    folder, _ = made
    quantize(folder / "model.onnx", tmp_path / "model.onnx", "int4", target="cuda")
    graph = ir.load(tmp_path / "model.onnx").graph
    assert all(len(node.inputs) < 17 for node in graph if node.op_type == "GroupQueryAttention")
