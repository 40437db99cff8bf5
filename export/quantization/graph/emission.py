"""Replace a graph's float linears by ONNX Runtime's quantized operators.

An emitter turns the linears that read one activation into nodes; one product of all takes less time than several.
Algorithms work on matrices only, so a new one needs no new emitter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from edgemix.export.graphs.rewrites import CONTRIB, add_half, add_initializer, replace_linear, replace_linears
from edgemix.export.quantization.algorithms.blocks import concatenate
from edgemix.export.quantization.algorithms.nf4 import nf4

if TYPE_CHECKING:
    from edgemix.export.graphs.weights import Linear
    from edgemix.export.quantization.algorithms.blocks import Blocks, Quantizer

Emitter: TypeAlias = Callable[[ir.Graph, Sequence["Linear"]], None]
"""Replaces linears of the graph that read one activation by their quantized form."""


def block_emitter(quantizer: Quantizer) -> Emitter:
    """Return an emitter of MatMulNBits over the quantizer's blocks."""

    def emit(graph: ir.Graph, readers: Sequence[Linear]) -> None:
        emit_blocks(graph, readers, [quantizer(linear.matrix()) for linear in readers], BlockSums(graph))

    return emit


def emit_blocks(graph: ir.Graph, readers: Sequence[Linear], blocks: Sequence[Blocks], sums: BlockSums) -> None:
    """Replace linears that read one activation by products with blocks, one for all whose blocks are alike."""
    alike: dict[tuple[int, int, int], list[tuple[Linear, Blocks]]] = {}
    for linear, each in zip(readers, blocks, strict=True):
        alike.setdefault((each.bits, each.block, each.sums), []).append((linear, each))
    for pairs in alike.values():
        group, parts = zip(*pairs, strict=True)
        nodes, value = sums.append(group[0].node.inputs[0], parts[0])
        together = concatenate(parts)
        tensors = add_blocks(graph, group[0].weight.name, together)
        replace_linears(graph, group, [*nodes, matmul_nbits(value, together, tensors)])


class BlockSums:
    """Append the sums of an activation's blocks to it, once for all linears that read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._extended: dict[ir.Value, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}

    def append(self, value: ir.Value, blocks: Blocks) -> tuple[list[ir.Node], ir.Value]:
        """Return the new nodes that compute the blocks' input from an activation [..., K], and their output."""
        if not blocks.sums:
            return [], value
        if value in self._extended:
            return [], self._extended[value]
        nodes = self._sums(value, blocks)
        joined = ir.node("Concat", [value, nodes[-1].outputs[0]], {"axis": -1})
        self._extended[value] = joined.outputs[0]
        return [*nodes, joined], joined.outputs[0]

    def _sums(self, value: ir.Value, blocks: Blocks) -> list[ir.Node]:
        """Return the nodes of the sums: a ReduceSum if K needs no padding, else a MatMul."""
        if value.shape is not None and blocks.inputs == blocks.columns + blocks.sums:
            shape = [0] * (value.shape.rank() - 1) + [-1, blocks.block]
            cut = ir.node("Reshape", [value, self._constant(f"sums.shape.{len(shape)}", np.array(shape, np.int64))])
            last = self._constant("sums.last", np.array([-1], np.int64))
            return [cut, ir.node("ReduceSum", [cut.outputs[0], last], {"keepdims": 0})]
        ones = np.repeat(np.eye(blocks.sums, blocks.inputs - blocks.columns, dtype=np.float16), blocks.block, axis=0)
        return [ir.node("MatMul", [value, self._constant(f"sums.{blocks.columns}", ones)])]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self._constants:
            add = add_half if array.dtype == np.float16 else add_initializer
            self._constants[name] = add(self._graph, name, array)
        return self._constants[name]


def nf4_emitter(graph: ir.Graph, readers: Sequence[Linear]) -> None:
    """Replace linears by MatMulBnb4."""
    for linear in readers:
        _emit_nf4(graph, linear)


def _emit_nf4(graph: ir.Graph, linear: Linear) -> None:
    matrix = linear.matrix()
    weight = nf4(matrix)
    codes = add_initializer(graph, f"{linear.weight.name}.nf4", weight.codes)
    maxima = add_initializer(graph, f"{linear.weight.name}.absmax", weight.maxima)
    rows, columns = matrix.shape
    attributes = {"K": columns, "N": rows, "block_size": weight.block, "quant_type": 1}
    node = ir.node("MatMulBnb4", [linear.node.inputs[0], codes, maxima], attributes, domain=CONTRIB)
    replace_linear(graph, linear, [node])


def matmul_nbits(value: ir.Value, blocks: Blocks, tensors: Sequence[ir.Value]) -> ir.Node:
    """Return the product of an activation (with sums appended, if the blocks have some) and stored blocks."""
    attributes = {
        "K": blocks.inputs,
        "N": len(blocks.codes),
        "bits": blocks.bits,
        "block_size": blocks.block,
        "accuracy_level": 4,  # permits products in int8; CPUs use it, CUDA computes in float16 all the same
    }
    return ir.node("MatMulNBits", [value, *tensors], attributes, domain=CONTRIB)


def add_blocks(graph: ir.Graph, name: str, blocks: Blocks) -> list[ir.Value]:
    """Add the blocks to the graph, in MatMulNBits' order: codes, scales and, if there are any, zero points."""
    tensors = [
        add_initializer(graph, f"{name}.codes", blocks.packed_codes()),
        add_half(graph, f"{name}.scales", blocks.scales),
    ]
    zero_points = blocks.packed_zero_points()
    if zero_points is not None:
        tensors.append(add_initializer(graph, f"{name}.zero_points", zero_points))
    return tensors
