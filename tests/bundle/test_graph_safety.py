"""Graphs that a bundle may not hold: each is refused before ONNX Runtime sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from helpers.onnx_members import random_member, write_graph, write_stack
from onnx import TensorProto, helper, numpy_helper

from edgemix.bundle.graph_safety import MAX_INTEGER, MAX_NAME, OPERATORS, verify_graph
from edgemix.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    write_graph(path, random_member(0))
    return path


def refused(graph: Path, edit: Callable[[onnx.ModelProto], object], reason: str) -> None:
    model = onnx.load(graph)
    edit(model)
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=reason):
        verify_graph(graph)


def node(*inputs: str, operator: str, domain: str = "", **attributes: object) -> Callable[[onnx.ModelProto], None]:
    return lambda it: it.graph.node.append(
        helper.make_node(operator, list(inputs), ["made"], domain=domain, **attributes)
    )


def constant(value: object, name: str = "size") -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, np.int64), name)


def sized(operator: str, value: object, *inputs: str) -> Callable[[onnx.ModelProto], None]:
    """A node whose input "size" is a constant."""

    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(constant(value))
        node(*inputs, operator=operator)(model)

    return edit


@pytest.mark.parametrize("cache", ["shared", "growing"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sound_graphs_pass(tmp_path: Path, cache: str, dtype: str) -> None:
    write_graph(tmp_path / "model.onnx", random_member(0, cache=cache, dtype=dtype))
    assert verify_graph(tmp_path / "model.onnx") == frozenset()


def test_the_files_of_a_sound_graph_are_returned(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_stack(path, [random_member(0), random_member(1)])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert verify_graph(path) == {"w.data"}


REFUSED_OPERATORS = ("Loop", "If", "Scan", "SequenceMap", "RandomNormal", "Bernoulli", "StringNormalizer", "Optional")


def axis(size: int) -> Callable[[onnx.ModelProto], None]:
    return lambda it: setattr(it.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", size)


def body() -> onnx.GraphProto:
    return helper.make_graph([], "body", [], [])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        *((node("logits", operator=name), name) for name in REFUSED_OPERATORS),
        (node("logits", operator="Add", domain="evil"), "evil.Add"),
        (node("logits", operator="Add", domain="com.microsoft"), "com.microsoft.Add"),
        (node("logits", operator="Identity", body=body()), "a subgraph"),
        (node("logits", operator="Identity", bodies=[body()]), "subgraphs"),
        (lambda it: it.functions.append(helper.make_function("", "Add", [], [], [], [])), "functions"),
        (lambda it: it.training_info.add(), "training"),
        (lambda it: it.graph.sparse_initializer.add(), "sparse"),
    ],
)
def test_what_could_loop_or_call_is_refused(
    graph: Path, edit: Callable[[onnx.ModelProto], object], reason: str
) -> None:
    refused(graph, edit, reason)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (sized("ConstantOfShape", [1 << 28], "size"), "integer 268,435,456"),
        (sized("ConstantOfShape", [1 << 20, 1 << 20], "size"), "ConstantOfShape makes a tensor"),
        (sized("Expand", [1 << 62], "logits", "size"), "Expand makes a tensor"),
        (sized("Tile", [1 << 14, 1 << 14, 1], "logits", "size"), "Tile makes a tensor"),
        (sized("Range", 1 << 40, "nought", "size", "one"), "Range makes a tensor"),
        (node(operator="Constant", value=constant([1 << 31])), "integer 2,147,483,648"),
        (node(operator="Constant", value_ints=[-(1 << 31)]), "integer -2,147,483,648"),
        (node("logits", operator="EyeLike", k=1 << 30), "integer 1,073,741,824"),
        # Kernels take the lower 32 bits: heads were 0, and the process ended with a division by zero.
        (node("logits", "logits", operator="Einsum", equation="abc,...->" + "a" * 40), "its equation is"),
        (node("logits", operator="Transpose", perm=[1 << 62]), "integer 4,611,686,018,427,387,904 in an attr"),
    ],
)
def test_enormous_tensors_of_constant_shapes_are_refused(
    graph: Path, edit: Callable[[onnx.ModelProto], object], reason: str
) -> None:
    """A ConstantOfShape of 2**28 took 3 GB while the graph was loaded."""
    refused(graph, edit, reason)


def test_a_shape_in_a_constant_node_is_a_constant_too(graph: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        value = constant([1 << 20, 1 << 20])
        model.graph.node.append(helper.make_node("Constant", [], ["shape"], value=value))
        node("shape", operator="ConstantOfShape")(model)

    refused(graph, edit, "ConstantOfShape makes a tensor")


def of_shape(*dims: int, dtype: int = TensorProto.FLOAT, **data: object) -> Callable[[onnx.ModelProto], None]:
    return lambda it: it.graph.initializer.append(TensorProto(name="w", dims=dims, data_type=dtype, **data))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (of_shape(2, raw_data=bytes(9)), "needs 8 bytes, and has 9"),
        (of_shape(1 << 40, 1 << 40, raw_data=bytes(8)), "and has 8"),
        (of_shape(3, float_data=[1.0]), "needs 3 values, and has 1"),
        (of_shape(1, dtype=TensorProto.INT64, int64_data=[-1, -2]), "needs 1 values, and has 2"),
        (of_shape(4, dtype=TensorProto.INT4, int32_data=[1]), "needs 2 values"),
        (of_shape(1, raw_data=bytes(4), float_data=[1.0]), "its data twice"),
        (of_shape(-1, raw_data=b""), "the shape"),
        (of_shape(1, dtype=TensorProto.STRING, string_data=[b"a"]), "strings"),
        (of_shape(1, dtype=99, raw_data=bytes(4)), "dtype 99"),
    ],
)
def test_tensors_have_the_bytes_of_their_shape(
    graph: Path, edit: Callable[[onnx.ModelProto], object], reason: str
) -> None:
    refused(graph, edit, reason)


def test_a_tensor_in_a_file_has_the_bytes_of_its_shape(graph: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        of_shape(4, data_location=1)(model)
        for key, value in {"location": "w.data", "offset": "0", "length": "8"}.items():
            model.graph.initializer[-1].external_data.add(key=key, value=value)

    (graph.parent / "w.data").write_bytes(bytes(16))
    refused(graph, edit, "needs 16 bytes, and takes 8")


@pytest.mark.parametrize("name", [b"present.0.key", b"logits", b"batch", b"table"])
def test_names_that_are_no_text_are_refused(graph: Path, name: bytes) -> None:
    """ONNX Runtime's Python raised a UnicodeDecodeError when an input whose name is no UTF-8 was read."""
    graph.write_bytes(graph.read_bytes().replace(name, b"\xff" * len(name)))
    with pytest.raises(BundleError, match="no UTF-8"):
        verify_graph(graph)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda it: it.graph.node[0].output.append("a" * (MAX_NAME + 1)), "a name of"),
        (axis(MAX_INTEGER + 1), "an axis of 67,108,865"),
        (axis(-1), "an axis of -1"),
        (lambda it: it.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent(), "sequences"),
    ],
)
def test_names_and_declared_shapes_are_bounded(
    graph: Path, edit: Callable[[onnx.ModelProto], object], reason: str
) -> None:
    refused(graph, edit, reason)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (node("logits", operator="Max"), "takes two"),
        (node("logits", "", operator="Min"), "takes two"),
        (node("logits", "shares", "table", operator="Min"), "takes two"),
        (node("logits", "input_ids", operator="GatherND", batch_dims=-1), "batch_dims is negative"),
    ],
)
def test_what_crashes_onnx_runtime_is_refused(
    graph: Path, edit: Callable[[onnx.ModelProto], object], reason: str
) -> None:
    """ONNX Runtime 1.32 ends the process with a segmentation fault or an abort at such nodes."""
    refused(graph, edit, reason)


def test_a_second_graph_is_refused(graph: Path) -> None:
    """Protobuf merges a message that is there twice; another parser might see one of them alone."""
    data = onnx.load(graph).SerializeToString()
    graph.write_bytes(data + onnx.ModelProto(graph=body()).SerializeToString())
    with pytest.raises(BundleError, match="2 graphs"):
        verify_graph(graph)


def test_the_list_has_no_misspelled_operator() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert OPERATORS[""] <= known
