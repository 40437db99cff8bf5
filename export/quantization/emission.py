"""Rewriting the graph: float weights out, ONNX Runtime's quantised operators in.

An emitter turns one `Linear` into nodes. Algorithms see matrices only, so a new one needs no new emitter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from edgemix.export.quantization.nf4 import nf4

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgemix.export.quantization.blocks import Blocks, Quantizer
    from edgemix.export.quantization.weights import Linear

CONTRIB = "com.microsoft"

Emitter: TypeAlias = Callable[[ir.Graph, "Linear"], None]
"""Replaces one linear of the graph by its quantised form."""


def block_emitter(quantizer: Quantizer) -> Emitter:
    """Linears as MatMulNBits over the quantizer's blocks."""

    def emit(graph: ir.Graph, linear: Linear) -> None:
        blocks = quantizer(linear.matrix())
        tensors = add_blocks(graph, linear.weight.name, blocks)
        replace_linear(graph, linear, [matmul_nbits(linear, blocks, tensors)])

    return emit


def nf4_emitter(graph: ir.Graph, linear: Linear) -> None:
    """A linear as MatMulBnb4."""
    matrix = linear.matrix()
    weight = nf4(matrix)
    codes = add_initializer(graph, f"{linear.weight.name}.nf4", weight.codes)
    maxima = add_initializer(graph, f"{linear.weight.name}.absmax", weight.maxima)
    rows, columns = matrix.shape
    attributes = {"K": columns, "N": rows, "block_size": weight.block, "quant_type": 1}
    node = ir.node("MatMulBnb4", [linear.node.inputs[0], codes, maxima], attributes, domain=CONTRIB)
    replace_linear(graph, linear, [node])


def matmul_nbits(linear: Linear, blocks: Blocks, tensors: Sequence[ir.Value]) -> ir.Node:
    """The linear's product with stored blocks."""
    attributes = {
        "K": blocks.columns,
        "N": len(blocks.codes),
        "bits": blocks.bits,
        "block_size": blocks.block,
        "accuracy_level": 4,  # permits products in int8; CPUs use it, CUDA computes in float16 all the same
    }
    return ir.node("MatMulNBits", [linear.node.inputs[0], *tensors], attributes, domain=CONTRIB)


def add_blocks(graph: ir.Graph, name: str, blocks: Blocks) -> list[ir.Value]:
    """The blocks as constants of the graph, in MatMulNBits' order: codes, scales and, if there are any, zero points."""
    tensors = [
        add_initializer(graph, f"{name}.codes", blocks.packed_codes()),
        add_half(graph, f"{name}.scales", blocks.scales),
    ]
    zero_points = blocks.packed_zero_points()
    if zero_points is not None:
        tensors.append(add_initializer(graph, f"{name}.zero_points", zero_points))
    return tensors


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of the graph, its name made unique."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}.{count}", count + 1
    tensor = ir.tensor(np.ascontiguousarray(array), name=unique)
    value = ir.Value(name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def add_half(graph: ir.Graph, name: str, array: NDArray[np.float16]) -> ir.Value:
    """A float16 initializer, seen by the graph as float32; ONNX Runtime folds the cast when it loads the graph."""
    cast = ir.node("Cast", [add_initializer(graph, name, array)], {"to": ir.DataType.FLOAT})
    cast.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(graph[0], cast)
    return cast.outputs[0]


def replace_linear(graph: ir.Graph, linear: Linear, nodes: list[ir.Node]) -> None:
    """Put `nodes` (and an Add where there is a bias) in the place of the linear's node."""
    if linear.bias is not None:
        nodes = [*nodes, ir.node("Add", [nodes[-1].outputs[0], linear.bias])]
    replace(graph, linear.node, nodes)


def replace(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put `nodes` in the place of `old`; the last output takes over the old one's name, type and readers."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], nodes, old.outputs, nodes[-1].outputs)
