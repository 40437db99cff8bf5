"""The reader of external data against graphs that the onnx package made, and against bytes that nobody should."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemix.bundle import external_data
from edgemix.bundle.external_data import ExternalTensor, external_files, external_tensors
from edgemix.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path


def external(location: str = "w.data", offset: object = 0, length: object = 16, **more: object) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph_with(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [], initializer=list(tensors))


def holding(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def around(graph: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["x"], ["y"], then_branch=graph)


def function_with(node: onnx.NodeProto) -> onnx.ModelProto:
    function = helper.make_function("d", "f", [], [], [node], [helper.make_opsetid("", 20)])
    return helper.make_model(graph_with(), functions=[function])


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[8])


def training(graph: onnx.GraphProto) -> onnx.ModelProto:
    model = helper.make_model(graph_with())
    model.training_info.add(algorithm=graph)
    return model


def sparse_graph() -> onnx.GraphProto:
    graph = graph_with()
    graph.sparse_initializer.append(sparse(numpy_helper.from_array(np.ones(4)), external()))
    return graph


MODELS = {
    "initializer": lambda t: helper.make_model(graph_with(tensors=(t,))),
    "attribute": lambda t: helper.make_model(graph_with(holding(t))),
    "list of tensors": lambda t: helper.make_model(graph_with(helper.make_node("N", [], [], ts=[t]))),
    "sparse attribute": lambda t: helper.make_model(graph_with(helper.make_node("N", [], [], s=sparse(t, t)))),
    "subgraph": lambda t: helper.make_model(graph_with(around(graph_with(tensors=(t,))))),
    "list of graphs": lambda t: helper.make_model(
        graph_with(helper.make_node("N", [], [], gs=[graph_with(tensors=(t,))]))
    ),
    "function": lambda t: function_with(holding(t)),
    "attribute in a subgraph in a function": lambda t: function_with(around(graph_with(holding(t)))),
    "training": lambda t: training(graph_with(holding(t))),
}


def save(folder: Path, model: onnx.ModelProto | bytes, data: int = 64) -> Path:
    (folder / "w.data").write_bytes(bytes(data))
    graph = folder / "model.onnx"
    graph.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return graph


@pytest.mark.parametrize("place", MODELS)
def test_external_tensors_are_found_everywhere(tmp_path: Path, place: str) -> None:
    graph = save(tmp_path, MODELS[place](external(offset=32, length=32)))
    assert set(external_tensors(graph)) == {ExternalTensor("w.data", 32, 32)}
    with pytest.raises(BundleError, match=r"contains \.\."):
        external_files(save(tmp_path, MODELS[place](external("../../etc/passwd"))))


def test_sparse_initializers_are_found(tmp_path: Path) -> None:
    assert external_files(save(tmp_path, helper.make_model(sparse_graph()))) == {"w.data"}


def test_a_graph_that_onnx_saved(tmp_path: Path) -> None:
    arrays = [np.full(size, size, np.float32) for size in (3, 500, 1000)]
    tensors = [numpy_helper.from_array(array, f"t{array.size}") for array in arrays]
    model = helper.make_model(graph_with(tensors=tuple(tensors)))
    graph = tmp_path / "model.onnx"
    onnx.save(model, graph, save_as_external_data=True, location="all.data", size_threshold=100)
    found = sorted(external_tensors(graph), key=lambda tensor: tensor.length)
    assert [(tensor.location, tensor.length) for tensor in found] == [("all.data", 2000), ("all.data", 4000)]
    data = (tmp_path / "all.data").read_bytes()
    for tensor, array in zip(found, arrays[1:], strict=True):
        assert data[tensor.offset : tensor.offset + tensor.length] == array.tobytes()


def test_weights_inside_the_graph_are_jumped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw tensor costs one step, whatever its size and whatever its bytes look like."""
    monkeypatch.setattr(external_data, "MAX_FIELDS", 30)
    inside = numpy_helper.from_array(np.frombuffer(external("../x").SerializeToString() * 10_000, np.uint8).copy())
    assert external_files(save(tmp_path, helper.make_model(graph_with(tensors=(inside,))))) == frozenset()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (external("/etc/passwd"), "is absolute"),
        (external("a/../../b"), "contains .."),
        (external("a\\b"), "not allowed"),
        (external("C:w.data"), "not allowed"),
        (external("w\0.data"), "not allowed"),
        (external("*/_ORT_MEM_ADDR_/*"), "not allowed"),
        (external(""), "is empty"),
        (external("./w.data"), "empty part"),
        (external("x" * 300), "too long"),
        (external("x" * 5000), "too long"),
        (external("missing.data"), "are missing"),
        (external("."), "empty part"),
        (external(None), "no location"),  # type: ignore[arg-type]
        (external("outside.data"), "leaves the folder"),
        (external("loop"), "cannot be followed|are missing"),
        (external(offset=64, length=1), "which has 64"),
        (external(offset=0, length=65), "which has 64"),
        (external(offset=65, length=None), "which has 64"),
        (external(offset=-1), "not a number of bytes"),
        (external(length=-1), "not a number of bytes"),
        (external(offset=2**64), "not a number of bytes"),
        (external(length="1e3"), "not a number of bytes"),
        (external(length="٤"), "not a number of bytes"),
        (external(length=""), "not a number of bytes"),
        (external(prepacked_0="x|0;1;"), "unknown key 'prepacked_0'"),
    ],
)
def test_hostile_places_are_refused(tmp_path: Path, tensor: TensorProto, message: str) -> None:
    folder = tmp_path / "members"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (folder / "outside.data").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match=message):
        external_files(save(folder, helper.make_model(graph_with(tensors=(tensor,)))))


def test_a_tensor_that_says_where_it_lies_twice(tmp_path: Path) -> None:
    tensor = external()
    tensor.external_data.add(key="location", value="other.data")
    with pytest.raises(BundleError, match="twice the key 'location'"):
        external_files(save(tmp_path, helper.make_model(graph_with(tensors=(tensor,)))))


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def message(field: int, content: bytes, *, tag_bits: int = 0) -> bytes:
    return varint(field << 3 | 2 | tag_bits) + varint(len(content)) + content


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x3a", "cut off"),
        (b"\x3a\x05abc", "beyond its message"),
        (message(7, b"\x0a\x7f"), "beyond its message"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "beyond its message"),
        (b"\x3a" + b"\xff" * 11, "more than ten bytes"),
        (b"\x09\x00", "beyond its message"),
        (b"\x0d\x00", "beyond its message"),
        (b"\x3b", "wire type 3"),
        (b"\x3f", "wire type 7"),
        (b"\x02\x00", "field tag"),
        (message(7, b"", tag_bits=1 << 32), "field tag"),
        (message(7, message(5, message(13, message(1, b"\xff")))), "no UTF-8"),
        (message(7, message(5, message(13, message(1, b"location") * 2))), "repeated"),
    ],
)
def test_malformed_graphs_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        external_files(save(tmp_path, data))


def test_depth_and_number_of_fields_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b""
    for _ in range(5000):
        content = message(1, message(5, message(6, content)))
    with pytest.raises(BundleError, match="more than 100 deep"):
        external_files(save(tmp_path, message(7, content)))
    monkeypatch.setattr(external_data, "MAX_FIELDS", 1000)
    with pytest.raises(BundleError, match="more than 1,000 fields"):
        external_files(save(tmp_path, b"\x3a\x00" * 1001))


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    for data in (b"", b"not a graph at all", bytes(100)):
        with pytest.raises(BundleError):
            external_files(save(tmp_path, data))
    huge = tmp_path / "huge.onnx"
    with huge.open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(BundleError, match="no ONNX model"):
        external_files(huge)


def test_every_cut_of_a_graph_is_refused_or_harmless(tmp_path: Path) -> None:
    """A cut at a field's end is still protobuf; nothing but a clean answer may come of any other."""
    whole = MODELS["attribute in a subgraph in a function"](external()).SerializeToString()
    refused = 0
    for end in range(1, len(whole)):
        try:
            external_files(save(tmp_path, whole[:end]))
        except BundleError:
            refused += 1
    assert refused > 0.9 * len(whole)
