"""Weights in the layout of this machine's kernels: the same results, and never worse off than without."""

import numpy as np
import onnxruntime as ort
import pytest
from helpers.onnx_members import VOCABULARY, random_member, write_bundle

from edgemix.errors import BundleError
from edgemix.runtime import Mixture
from edgemix.runtime.graphs import providers
from edgemix.runtime.graphs.prepacked_weights import PrepackedWeights


@pytest.fixture
def bundle(tmp_path):
    forms = {
        "a": random_member(1, tokens=VOCABULARY, padding=6),
        "b": random_member(2, tokens=VOCABULARY, padding=14, cache="growing"),
    }
    return write_bundle(tmp_path / "bundle", forms, weights={"a": 0.6, "b": 0.4})


@pytest.fixture
def opened(monkeypatch):
    """The graphs that sessions are opened from."""
    graphs, real = [], providers.create_session
    monkeypatch.setattr(providers, "create_session", lambda graph, *rest: graphs.append(graph) or real(graph, *rest))
    return graphs


def text_of(bundle, **options):
    with Mixture.load(bundle, "cpu", threads=1, **options) as mixture:
        return mixture.generate("The owl sat", max_new_tokens=24).token_ids


def test_the_text_is_the_same_and_the_second_time_they_are_there(bundle, tmp_path, opened):
    expected = text_of(bundle)
    folder = tmp_path / "packed"
    assert text_of(bundle, packed=folder) == expected
    assert len(list(folder.iterdir())) == 2
    opened.clear()
    assert text_of(bundle, packed=folder) == expected
    assert all(str(folder) in graph for graph in opened)
    assert len(opened) == 2


def test_another_machine_packs_anew(bundle, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    text_of(bundle, packed=folder)
    real = PrepackedWeights.of_this_machine(folder)._machine
    monkeypatch.setattr(
        PrepackedWeights, "of_this_machine", classmethod(lambda cls, path: cls(path, real + " Mark II"))
    )
    text_of(bundle, packed=folder)
    assert len(list(folder.iterdir())) == 4


def test_what_is_damaged_is_thrown_away(bundle, tmp_path):
    folder = tmp_path / "packed"
    expected = text_of(bundle, packed=folder)
    for graph in folder.glob("*/model.onnx"):
        graph.write_bytes(b"no graph")
    assert text_of(bundle, packed=folder) == expected
    assert not list(folder.iterdir())
    assert text_of(bundle, packed=folder) == expected
    assert len(list(folder.iterdir())) == 2


def test_where_nothing_can_be_written_the_graph_itself_is_opened(bundle, tmp_path):
    folder = tmp_path / "packed"
    folder.write_text("a file")
    assert text_of(bundle, packed=folder) == text_of(bundle)


def test_an_interruption_leaves_nothing(bundle, tmp_path, monkeypatch):
    folder = tmp_path / "packed"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(providers, "create_session", interrupt)
    with pytest.raises(KeyboardInterrupt):
        text_of(bundle, packed=folder)
    assert not list(folder.iterdir())


def test_quantised_weights_are_mapped(tmp_path):
    """The layout of MatMulNBits' kernel is in the file, and what it computes is what it computed."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (256, 8, 16), np.uint8), rng.random((256 * 8,), np.float32)
    attributes = {"K": 256, "N": 256, "bits": 4, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 256])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path = tmp_path / "model.onnx"
    save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    folder, x = tmp_path / "packed", rng.random((3, 256), np.float32)
    expected = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    for _ in range(2):
        session = providers.open_session(
            path, providers.PROVIDERS["cpu"], packed=(PrepackedWeights(folder, "here"), "digest")
        )
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
    (data,) = folder.glob("*/model.onnx.data")
    assert data.stat().st_size > codes.nbytes + scales.nbytes


def test_a_graph_that_is_none_is_told_of(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot load"):
        providers.open_session(
            tmp_path / "model.onnx",
            providers.PROVIDERS["cpu"],
            packed=(PrepackedWeights(tmp_path / "packed", "x"), "y"),
        )
    assert not list((tmp_path / "packed").iterdir())
