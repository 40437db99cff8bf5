"""Make attention batch invariant: its output for a token is bit for bit the same whatever else is in a call.

ONNX Runtime multiplies one row of queries by another kernel than several, and the two differ in their last bits; where
products round activations to 8 bits, those bits grow to tenths of a logit. So no row is alone: a single token's
queries, keys and values are doubled, as a second token behind it, and only the first of the two goes on. The cache
holds the second one's state until the next token overwrites it. Everything else in a graph works row by row.

Several tokens of several sequences are one chunk for the operator's `query_seqlens`, which has been there since ONNX
Runtime 1.32. So a text alone, drafts that are verified together, and a batch give a token the same
logits. The exceptions are sliding windows that are shorter than the text: their sums begin elsewhere when a call has
other tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemix.bundle import graph_io
from edgemix.export.graphs.rewrites import add_initializer

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTHS, _TOTAL, _ANGLES, _QUERIES = 5, 6, slice(7, 9), 16
"""Indices of GroupQueryAttention's inputs: the rows' lengths less one, the largest length, the cosine and sine tables,
and each row's number of tokens in the call.
"""


def make_batch_invariant(graph: ir.Graph) -> None:
    """Rewrite every GroupQueryAttention to read at least two rows of queries.

    Args:
        graph: Changed in place. Nothing happens if it has no GroupQueryAttention, or was rewritten already.
    """
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention" and len(node.inputs) <= _QUERIES]
    if not nodes:
        return
    pairs = _PairedRows(graph, nodes[0])
    for layer, node in enumerate(nodes):
        pairs.fit(node, f"{graph_io.PAST_PREFIX}{layer}")
    for table in {value for node in nodes for value in node.inputs[_ANGLES] if value is not None}:
        _lengthen(table)


class _PairedRows:
    """The row indices and lengths that all layers share."""

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        self._graph, self._first = graph, first
        self._lengths: dict[tuple[ir.Value, ir.Value], Sequence[ir.Value]] = {}
        ids = next(value for value in graph.inputs if value.name == graph_io.INPUT_IDS)
        zero, one, two = (self._constant(number, np.int64) for number in (0, 1, 2))
        count = self._put("Squeeze", self._put("Shape", ids, start=1, end=2))
        least = self._put("Max", count, two)
        self._more = self._put("Cast", self._put("Sub", least, count), to=ir.DataType.INT32)
        self._least = self._put("Cast", least, to=ir.DataType.INT32)
        last = self._put("Sub", count, one)
        self._doubled = self._put("Min", self._put("Range", zero, least, one), last)
        self._kept = self._put("Range", zero, count, one)

    def fit(self, node: ir.Node, name: str) -> None:
        """Rewrite one layer's attention."""
        graph = self._graph
        for index, part in enumerate(node.inputs[:3]):
            if part is not None:
                rows = ir.node("Gather", [part, self._doubled], {"axis": 1}, name=f"{name}.rows.{index}")
                rows.outputs[0].type = part.type
                graph.insert_before(node, rows)
                node.replace_input_with(index, rows.outputs[0])
        node.resize_inputs(_QUERIES + 1)
        for index, value in zip((LENGTHS, _TOTAL, _QUERIES), self._longer(node), strict=True):
            node.replace_input_with(index, value)
        made = node.outputs[0]
        kept = ir.node("Gather", [made, self._kept], {"axis": 1}, name=f"{name}.kept")
        kept.outputs[0].type, kept.outputs[0].shape = made.type, made.shape
        made.shape = None
        for use in list(made.uses()):
            if use.node is not kept:
                use.node.replace_input_with(use.idx, kept.outputs[0])
        graph.insert_after(node, kept)

    def _longer(self, node: ir.Node) -> Sequence[ir.Value]:
        """Return the rows' lengths less one, the largest length, and each row's number of tokens in the call."""
        last, total = node.inputs[LENGTHS], node.inputs[_TOTAL]
        if (last, total) not in self._lengths:
            flat = self._put("Reshape", last, self._constant(-1, np.int64, 1))
            longer = self._put("Add", flat, self._more)
            length = self._put("Add", longer, self._constant(1, np.int32))
            queries = self._put("Min", length, self._least)  # a row that is padded has fewer
            self._lengths[last, total] = longer, self._put("Add", total, self._more), queries
        return self._lengths[last, total]

    def _put(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def _constant(self, number: int, dtype: type[np.integer], *shape: int) -> ir.Value:
        name = f"steady.{number}.{np.dtype(dtype).name}"
        return self._graph.initializers.get(name) or add_initializer(self._graph, name, np.full(shape, number, dtype))


def _lengthen(table: ir.Value) -> None:
    """Append a row to a table of angles: the doubled token may lie one position beyond the context."""
    rows = table.const_value.numpy()
    table.const_value = ir.tensor(np.concatenate([rows, rows[-1:]]), name=table.name)
    table.shape = ir.Shape([len(rows) + 1, rows.shape[1]])
