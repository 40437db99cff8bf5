"""Half precision: for the stored weights only, or for the whole graph."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from edgemix.export.graphs.rewrites import add_half, add_initializer, replace
from edgemix.export.graphs.weights import linears, lookups

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LARGEST = np.finfo(np.float16).max
_TINIEST = np.finfo(np.float16).smallest_subnormal

_WIDE = frozenset({"ConstantOfShape", "Pow", "Range", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"})
"""Operators that stay in float32: squares and sums leave float16's range, and the others make positions or masks."""


def store_in_float16(graph: ir.Graph) -> None:
    """Store embeddings and linears' weights in float16 and compute in float32.

    ONNX Runtime widens the weights once, when it loads the graph, so that only the files are smaller; float16
    arithmetic would be slower on most CPUs. An embedding's rows are widened as they are read.
    """

    @cache
    def widened(weight: ir.Value) -> ir.Value:
        return add_half(graph, f"{weight.name}.float16", to_half(weight.const_value.numpy()))

    for node in list(lookups(graph)):
        rows = ir.node("Gather", [widened(node.inputs[0]).producer().inputs[0], node.inputs[1]])
        replace(graph, node, [rows, ir.node("Cast", rows.outputs, {"to": _FLOAT})])
    for linear in list(linears(graph)):
        linear.weight.replace_all_uses_with(widened(linear.weight))


def store_halves(graph: ir.Graph, names: Collection[str]) -> None:
    """Store the weights of the linears with these weight names in float16 and compute in float32."""
    for linear in [linear for linear in linears(graph) if linear.weight.name in names]:
        half = to_half(linear.weight.const_value.numpy())
        linear.weight.replace_all_uses_with(add_half(graph, f"{linear.weight.name}.float16", half))


def compute_in_float16(graph: ir.Graph, opset: int) -> None:
    """Turn a float32 graph into a float16 one, its float inputs and outputs (cache, logits) included.

    Float32 remains where float16's range or precision would not do: in `_WIDE` operators, in what is made from integers
    (positions, masks), and from there on until it meets a float16 activation.
    """
    _bypass_widening(graph)
    floats = {value for value, kind in _element_types(graph, opset).items() if kind in (_FLOAT, _HALF)}
    wide = _wide_nodes(graph, floats)

    @cache
    def converted(value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if value.is_initializer() and value.dtype == _FLOAT and wanted == _HALF:
            return add_initializer(graph, f"{value.name}.float16", to_half(value.const_value.numpy()))
        present = value.dtype if value.is_initializer() else _FLOAT if value.producer() in wide else _HALF
        return value if wanted == present else _cast_after(graph, value, wanted)

    for node in list(graph):
        wanted = _FLOAT if node in wide else _HALF
        for index, value in enumerate(node.inputs):
            if value in floats:
                node.replace_input_with(index, converted(value, wanted))
        for output in floats.intersection(filter(_is_read, node.outputs)):  # norms' unread statistics stay as they are
            output.dtype = wanted
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", wanted)
    for value in floats.intersection(graph.inputs):
        value.dtype = _HALF
    for index, value in enumerate(graph.outputs):
        if value in floats and value.producer() in wide:
            name, value.name = value.name, f"{value.name}.float32"
            graph.outputs[index] = _cast_after(graph, value, _HALF)
            graph.outputs[index].name = name


def to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round to float16; finite values stay finite (a mask's -3.4e38) and no divisor's epsilon becomes zero."""
    finite = np.clip(values, -_LARGEST, _LARGEST, where=np.isfinite(values), out=values.copy())
    half = finite.astype(np.float16)
    return np.where((half == 0) & (values != 0), np.copysign(_TINIEST, values).astype(np.float16), half)


def _bypass_widening(graph: ir.Graph) -> None:
    """Let every reader of a widened float16 constant read the constant."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is not None and source.is_initializer() and source.dtype == _HALF:
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _wide_nodes(graph: ir.Graph, floats: set[ir.Value]) -> set[ir.Node]:
    """Return the nodes that stay in float32."""
    wide: set[ir.Node] = set()
    for node in graph:
        activations = [value for value in floats.intersection(node.inputs) if not value.is_initializer()]
        from_integers = node.op_type == "Cast" and not activations
        if node.op_type in _WIDE or from_integers or (activations and all(v.producer() in wide for v in activations)):
            wide.add(node)
    return wide


def _cast_after(graph: ir.Graph, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    """A cast of a node's output or of a graph input, right behind it."""
    node = ir.node("Cast", [value], {"to": wanted})
    node.outputs[0].dtype = wanted
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]


def _element_types(graph: ir.Graph, opset: int) -> dict[ir.Value, ir.DataType]:
    """The element type of every value, as far as operators' schemas tell; exporters do not store all of them."""
    types = {value: value.dtype for value in [*graph.inputs, *graph.initializers.values()]}
    for node in graph:
        for index, output in enumerate(node.outputs):
            types[output] = output.dtype or _inferred_type(node, index, types, opset)
    return types


def _inferred_type(node: ir.Node, index: int, types: dict[ir.Value, ir.DataType], opset: int) -> ir.DataType | None:
    """The type of the node's output, from its schema: fixed, given by an attribute, or that of an input."""
    given = [types.get(value) if value is not None else None for value in node.inputs]
    if node.domain:  # ONNX Runtime's operators: what they compute has the type of their (first) float input
        return next((kind for kind in given if kind in (_FLOAT, _HALF)), next(iter(given), None))
    if "to" in node.attributes:
        return ir.DataType(node.attributes.get_int("to"))
    if node.op_type == "ConstantOfShape":
        tensor = node.attributes.get_tensor("value", None)
        return _FLOAT if tensor is None else tensor.dtype
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    formal = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    if formal.startswith("tensor("):
        return _FLOAT if formal == "tensor(float)" else ir.DataType[formal[7:-1].upper()]
    for position, kind in enumerate(given):
        if schema.inputs[min(position, len(schema.inputs) - 1)].type_str == formal:
            return kind
    return None
