"""A graph's time by operator and by part of the model, and the work read from its file."""

from __future__ import annotations

import tempfile

import msgspec
import numpy as np
import onnx
import pytest
from helpers.onnx_members import random_member, write_bundle
from onnx import TensorProto, helper, numpy_helper

from edgemix.bundle.reader import read_manifest
from edgemix.errors import BundleError, EdgemixError
from edgemix.runtime import Mixture
from edgemix.runtime.graphs.providers import PROVIDERS
from edgemix.runtime.profiling.graphs import mark_of_name, read_graph, spread
from edgemix.runtime.profiling.operators import DECODES, PREFILLS, Call, Kernel, breakdown, profiled_calls, read_calls
from edgemix.runtime.profiling.roofline import Work, roofline_point


@pytest.fixture
def graph(tmp_path):
    """An embedding, two layers of a product each, a final norm, and a head tied to the embedding."""
    wide = {"embed_tokens.weight": (10, 4), "model.layers.0.proj.weight": (4, 4), "unused": (100, 100)}
    weights = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in wide.items()]
    weights.append(numpy_helper.from_array(np.zeros((4, 2, 1), np.uint8), "model.layers.1.proj.packed"))
    nodes = [
        helper.make_node("Gather", ["embed_tokens.weight", "input_ids"], ["e"], name="model/embed_tokens/Gather"),
        helper.make_node("MatMul", ["e", "model.layers.0.proj.weight"], ["a"], name="n0"),
        helper.make_node("Relu", ["a"], ["b"], name="n1"),
        helper.make_node("Add", ["b", "past_key_values.1.key"], ["c"], name="n2"),
        helper.make_node(
            "MatMulNBits",
            ["c", "model.layers.1.proj.packed"],
            ["d"],
            name="n3",
            domain="com.microsoft",
            K=4,
            N=4,
            bits=4,
        ),
        helper.make_node("GroupQueryAttention", ["d"], ["f"], name="n4", domain="com.microsoft", num_heads=3),
        helper.make_node("Relu", ["f"], ["v_model.norm.1"], name="n5"),
        helper.make_node("Transpose", ["embed_tokens.weight"], ["t"], name="n6"),
        helper.make_node("MatMul", ["v_model.norm.1", "t"], ["logits"], name="n7"),
    ]
    value = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n"])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [value], [output], weights)), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_parts_of_the_model_by_the_names_of_nodes_outputs_and_weights(graph):
    marks = read_graph(graph).marks()

    assert list(marks.values()) == ["embedding", "layer 0", "", "layer 1", "layer 1", "", "head", "", "head"]
    assert spread(marks.values())[2] == "layer 0"
    assert spread(marks.values())[7] == "head"


def test_nodes_before_the_first_layer_belong_to_no_layer():
    assert spread(["", "embedding", "", "layer 0", "", "head", ""]) == [
        *("other", "embedding", "other", "layer 0", "layer 0", "head", "head")
    ]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("/model/layers.11/attn/MatMul", "layer 11"),
        ("model/layers.3/mlp/Mul_node_7", "layer 3"),
        ("transformer.h.2.ln_1", "layer 2"),
        ("/lm_head/MatMul", "head"),
        ("/model/embed_tokens/Gather", "embedding"),
        ("node_Mul_12", ""),
        ("layers.1x", ""),
    ],
)
def test_names_of_several_exporters(name, part):
    assert mark_of_name(name) == part


def test_the_work_read_from_a_graph(graph):
    found = read_graph(graph)

    assert found.weight_bytes() == 4 * 40 + 4 * 16 + 8  # what nothing reads does not count; a tied table does
    assert found.multiply_adds() == 16 + 16 + 40
    assert found.query_heads == 3


def test_a_table_that_is_only_looked_up_is_not_read(graph):
    model = onnx.load(graph)
    del model.graph.node[-2:]
    onnx.save(model, graph)

    assert read_graph(graph).weight_bytes() == 4 * 16 + 8


@pytest.mark.parametrize("damage", [b"\x3a\xff", b"\x3a\x04\x0a\x02\x22\xff", b"\x3a\x05\x0a\x03\x22\x01\xff"])
def test_a_damaged_graph(tmp_path, damage):
    (tmp_path / "model.onnx").write_bytes(damage)

    with pytest.raises(BundleError, match="no sound ONNX model"):
        read_graph(tmp_path / "model.onnx")


def event(name, begin, seconds, cat="Node", **args):
    return {"cat": cat, "name": name, "ts": begin, "dur": seconds, "ph": "X", "pid": 1, "tid": 2, "args": args}


def test_nodes_belong_to_the_call_that_they_lie_in():
    trace = [
        event("session_initialization", 0, 50, "Session"),
        event("b_kernel_time", 130, 20, op_name="Mul"),
        event("model_run", 100, 60, "Session"),
        event("a_kernel_time", 110, 10, op_name="MatMul"),
        event("a_fence_before", 109, 1, op_name="MatMul"),
        event("model_run", 200, 40, "Session"),
        event("a_kernel_time", 205, 30, op_name="MatMul"),
    ]

    first, second = read_calls(msgspec.json.encode(trace))

    assert first == Call(60e-6, (Kernel("MatMul", "a", 10e-6, 10e-6), Kernel("Mul", "b", 30e-6, 20e-6)))
    assert second == Call(40e-6, (Kernel("MatMul", "a", 5e-6, 30e-6),))


@pytest.mark.parametrize("trace", [b"", b"{}", b'[{"cat": 1}]'])
def test_an_invalid_trace(trace):
    with pytest.raises(EdgemixError, match="cannot be read"):
        read_calls(trace)


def test_a_breakdown_is_that_of_the_median_call():
    def call(seconds, *kernels):
        return Call(seconds, tuple(Kernel(type_, name, 0.0, each) for type_, name, each in kernels))

    decodes = [
        call(9.0, ("MatMul", "x", 8.0)),
        call(3.0, ("Gather", "e", 0.5), ("MatMul", "x", 1.0), ("MatMul", "y", 1.0)),
        call(1.0, ("MatMul", "x", 1.0)),
    ]
    prefills = [call(4.0, ("Gather", "e", 1.0), ("MatMul", "x", 2.0), ("MatMul", "y", 0.5), ("Cast", "z", 0.25))]

    found = breakdown("math", 7, prefills, decodes, {"e": "embedding", "x": "layer 0", "y": "head"})

    assert (found.graph, found.prompt, found.prefill, found.decode) == ("math", 7, 4.0, 3.0)
    assert {o.type: (o.count, o.prefill, o.decode) for o in found.operators} == {
        "MatMul": (2, 2.5, 2.0),
        "Gather": (1, 1.0, 0.5),
        "Cast": (1, 0.25, 0.0),
    }
    assert {layer.name: (layer.prefill, layer.decode) for layer in found.layers} == {
        "embedding": (1.0, 0.5),
        "layer 0": (2.0, 1.0),
        "head": (0.75, 1.0),
    }
    assert found.operators[0].type == "MatMul"
    assert [layer.name for layer in found.layers] == ["embedding", "layer 0", "head"]


def test_onnx_runtimes_own_profiler_on_a_member(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entry = read_manifest(bundle).members[0]

    tokens, prefills, decodes = profiled_calls(bundle / entry.graph, entry, PROVIDERS["cpu"], 1, [1, 2, 3])
    found = breakdown(entry.name, tokens, prefills, decodes, read_graph(bundle / entry.graph).marks())

    assert (tokens, len(prefills), len(decodes)) == (3, PREFILLS - 1, DECODES - 1)
    assert {"GroupQueryAttention", "MatMul", "Gather"} <= {operator.type for operator in found.operators}
    assert 0 < sum(operator.decode for operator in found.operators) <= found.decode
    assert sum(layer.decode for layer in found.layers) == pytest.approx(sum(o.decode for o in found.operators))
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_cut_to_what_one_call_reads(bundle, monkeypatch):
    monkeypatch.setattr("edgemix.runtime.graphs.decoder.MAX_CHUNK", 16)
    entry = read_manifest(bundle).members[0]

    tokens, prefills, _ = profiled_calls(bundle / entry.graph, entry, PROVIDERS["cpu"], 1, [1] * 40)

    assert (tokens, len(prefills)) == (16, PREFILLS - 1)


def test_an_interruption_leaves_no_trace(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemix.runtime.graphs.decoder.DecoderGraph.extend", interrupt)
    entry = read_manifest(bundle).members[0]

    with pytest.raises(KeyboardInterrupt):
        profiled_calls(bundle / entry.graph, entry, PROVIDERS["cpu"], 1, [1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_the_roofline_is_the_longer_of_memory_and_arithmetic(bundle):
    work = Work(weights=1000, state=10, products=500, attention=4, int8=True)
    machine = sample_machine()

    decode = roofline_point("decode", [work, work], machine, tokens=1, context=100, seconds=1.0)
    assert decode.bytes == 2 * (1000 + 10 * 101)
    assert decode.operations == 2 * (500 + 4 * 101)
    assert (decode.bound, decode.floor) == ("memory", pytest.approx(decode.bytes / 100))

    prefill = roofline_point("prefill", [work], machine, tokens=100, context=0, seconds=1.0)
    assert prefill.operations == 100 * 500 + 4 * 5050
    assert (prefill.bound, prefill.floor) == ("compute", pytest.approx(prefill.operations / 1000))


def test_without_limits_there_is_no_roofline():
    machine = msgspec.structs.replace(sample_machine(), bandwidth=None, fp32_peak=None, int8_peak=None)

    assert roofline_point("decode", [Work(1, 1, 1, 1, int8=False)], machine, tokens=1, context=1, seconds=1.0) is None


def sample_machine():
    from helpers.profiles import sample_profile

    return msgspec.structs.replace(sample_profile().machine, bandwidth=100.0, fp32_peak=50.0, int8_peak=1000.0)


def test_the_work_of_a_member(tmp_path):
    folder = write_bundle(tmp_path / "bundle", {"math": random_member(1, tokens=258)})
    with Mixture.load(folder, "cpu", 1) as mixture:
        (member,) = mixture.ensemble().graphs
        entry = mixture.manifest.members[0]
        work = Work.of(read_graph(folder / entry.graph), member, "fp32")

    size = 272  # the vocabulary as a head's size
    assert work.state == 4 * 2 * size
    assert work.products == size * 258
    assert work.attention == 2 * size
    assert work.int8 is False
