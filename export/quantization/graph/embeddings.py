"""Embedding and head in 8-bit blocks, stored once if the model ties them.

MatMulNBits and GatherBlockQuantized read the same initializers in place. ONNX Runtime maps external data into memory,
so a lookup touches only the rows of its tokens and the head's repacked copy is the only one that is resident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from edgemix.export.graphs.rewrites import CONTRIB, add_initializer, replace, replace_linear
from edgemix.export.graphs.weights import head, lookups
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.quantization.graph.emission import add_blocks, matmul_nbits

if TYPE_CHECKING:
    from edgemix.export.graphs.weights import Matrix
    from edgemix.export.quantization.algorithms.block_table import BlockTable
    from edgemix.export.quantization.algorithms.blocks import Blocks

_BITS = 8
_BLOCK = 32


def quantize_embeddings(graph: ir.Graph, known: BlockTable | None = None, *, but: ir.Value | None = None) -> None:
    """Store every embedding and the head in 8-bit blocks and read them from there.

    Args:
        graph: Changed in place.
        known: Blocks of some of them; those with 8 bits and no zero points are kept.
        but: A weight that stays as it is.
    """
    tables: dict[ir.Value, _StoredMatrix] = {}

    def stored(weight: ir.Value, matrix: Matrix) -> _StoredMatrix:
        if weight not in tables:
            blocks = _known_blocks(known, matrix) or rtn(matrix, bits=_BITS, block=_BLOCK, symmetric=True)
            tables[weight] = _StoredMatrix(blocks, add_blocks(graph, weight.name, blocks))
        return tables[weight]

    for node in list(lookups(graph)):
        weight = node.inputs[0]
        if weight is not but:
            _look_up(graph, node, stored(weight, weight.const_value.numpy()))
    linear = head(graph)
    if linear is not None and linear.weight is not but:
        table = stored(linear.weight, linear.matrix())
        replace_linear(graph, linear, [matmul_nbits(linear.node.inputs[0], table.blocks, table.tensors)])


def has_blocks(known: BlockTable | None, matrix: Matrix) -> bool:
    """Return whether a table has blocks for an embedding or a head."""
    return _known_blocks(known, matrix) is not None


def _known_blocks(known: BlockTable | None, matrix: Matrix) -> Blocks | None:
    blocks = known.find(matrix) if known is not None else None
    if blocks is None or blocks.sums or (wide := blocks.widened()).zero_points is not None:
        return None
    return wide


class _StoredMatrix(NamedTuple):
    """A stored matrix [vocabulary, hidden] and its initializers."""

    blocks: Blocks
    tensors: list[ir.Value]


def _look_up(graph: ir.Graph, node: ir.Node, table: _StoredMatrix) -> None:
    """Replace a Gather of rows for ids [batch, sequence]: the blocks of each row, dequantized, joined and cut to K."""
    codes, scales = table.tensors
    columns, block = table.blocks.columns, table.blocks.block
    attributes = {"bits": _BITS, "block_size": block, "gather_axis": 0, "quantize_axis": 2}
    scales = ir.node("Unsqueeze", [scales, _constant(graph, [-1])])
    # The default zero point, spelled out: older CUDA kernels take 0 where the specification says 128.
    middle = add_initializer(graph, "middle", np.array(2 ** (_BITS - 1), np.uint8))
    zero_points = ir.node("Expand", [middle, _constant(graph, [*table.blocks.scales.shape, 1])])
    inputs = [codes, node.inputs[1], scales.outputs[0], zero_points.outputs[0]]
    rows = ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB)
    joined = ir.node("Reshape", [rows.outputs[0], _constant(graph, [0, 0, -1])])
    nodes = [scales, zero_points, rows, joined]
    if columns % block:
        ends = [_constant(graph, [0]), _constant(graph, [columns]), _constant(graph, [-1])]
        nodes.append(ir.node("Slice", [joined.outputs[0], *ends]))
    replace(graph, node, nodes)


def _constant(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    return add_initializer(graph, "constant", np.array(numbers, np.int64))
