"""Edit ONNX graphs in place: add constants, and put nodes in the place of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.export.graphs.weights import Linear

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add an initializer to the graph, under `name` with a number behind it if the name is taken."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}.{count}", count + 1
    tensor = ir.tensor(np.ascontiguousarray(array), name=unique)
    value = ir.Value(name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def add_half(graph: ir.Graph, name: str, array: NDArray[np.float16]) -> ir.Value:
    """Add a float16 initializer with a cast to float32; ONNX Runtime folds the cast when it loads the graph."""
    cast = ir.node("Cast", [add_initializer(graph, name, array)], {"to": ir.DataType.FLOAT})
    cast.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(graph[0], cast)
    return cast.outputs[0]


def cut_rotary_tables(graph: ir.Graph, positions: int) -> None:
    """Leave the first rows of the tables of rotary angles, float [positions, angles]."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if name.endswith(("cos_cache", "sin_cache")) and tensor is not None and tensor.shape[0] > positions:
            value.const_value = ir.tensor(np.ascontiguousarray(tensor.numpy()[:positions]), name=name)
            value.shape = value.const_value.shape


def replace_linear(graph: ir.Graph, linear: Linear, nodes: list[ir.Node]) -> None:
    """Replace a linear's node by `nodes`, and an Add where there is a bias."""
    if linear.bias is not None:
        nodes = [*nodes, ir.node("Add", [nodes[-1].outputs[0], linear.bias])]
    replace(graph, linear.node, nodes)


def replace_linears(graph: ir.Graph, readers: Sequence[Linear], nodes: list[ir.Node]) -> None:
    """Replace linears by `nodes`, the last of which computes the outputs of all of them, concatenated."""
    first, *others = readers
    if not others:
        replace_linear(graph, first, nodes)
        return
    widths = np.array([linear.outputs for linear in readers], np.int64)
    at = add_initializer(graph, f"{first.weight.name}.widths", widths)
    split = ir.node("Split", [nodes[-1].outputs[0], at], {"axis": -1}, num_outputs=len(readers))
    graph.insert_before(first.node, [*nodes, split])
    for linear, part in zip(readers, split.outputs, strict=True):
        replace_linear(graph, linear, [ir.node("Identity", [part])])


def replace(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Replace `old` by `nodes`; the last node's output takes over the old output's name, type and uses."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], nodes, old.outputs, nodes[-1].outputs)
