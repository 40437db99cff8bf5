"""Several members in one decoder graph: the base's weights are read once for all of them, and each has a row.

Every activation [batch, tokens, K] becomes [batch * members, tokens, K], a text's members next to each other, as if
they were texts of their own; so all that a graph does with a text (linears, norms, attention) stays as it is. A linear
gets beside it

    y + ((x down^T) * own) up^T,     down [members * rank, K],   up [N, members * rank],

where `own` keeps of each row what its member's part of `down` has made. The cache holds the members as texts, too:
[batch * members, heads, past, size].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemix.bundle import graph_io
from edgemix.errors import EdgemixError, InputError
from edgemix.export.graphs.batch_invariant_attention import LENGTHS, make_batch_invariant
from edgemix.export.graphs.rewrites import add_initializer
from edgemix.export.graphs.weights import head, linears, lookups

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.export.graphs.deltas import Delta
    from edgemix.export.graphs.weights import Linear, Matrix


def add_members(graph: ir.Graph, deltas: Mapping[str, Sequence[Delta]], members: int) -> None:
    """Let a base's fp32 decoder graph compute several members: logits [batch, kept, members, vocabulary].

    Args:
        graph: The base's, with a shared cache; changed in place.
        deltas: The members' additions to its weights, from `find_deltas`.
        members: Number of members.

    Raises:
        InputError: The graph's attention is not GroupQueryAttention, or it adds positions to its embeddings.
    """
    _MemberRewriter(graph, deltas, members).run()
    make_batch_invariant(graph)  # which also takes several tokens of several texts


def addition_matrices(deltas: Sequence[Delta]) -> tuple[Matrix, Matrix]:
    """Return the members' additions to one linear, concatenated: down [sum of ranks, K] and up [N, sum of ranks]."""
    down = np.concatenate([delta.down for delta in deltas])
    return down, np.ascontiguousarray(np.concatenate([delta.up for delta in deltas], axis=1))


def addition(name: str) -> str:
    """Return the name of the additions' second factor [sum of ranks, N] for the weight of a name."""
    return f"{name}.up"


class _MemberRewriter:
    """One rewriting of a graph."""

    def __init__(self, graph: ir.Graph, deltas: Mapping[str, Sequence[Delta]], members: int) -> None:
        self._graph, self._deltas, self._members = graph, deltas, members
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self._masks: dict[tuple[int, ...], ir.Value] = {}

    def run(self) -> None:
        graph = self._graph
        attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
        if not attentions or any(value.name == graph_io.POSITION_IDS for value in graph.inputs):
            raise InputError("members can share a graph only if positions enter it through GroupQueryAttention alone")
        added = list(linears(graph))
        self._compute_row_indices()
        for node in list(lookups(graph)):
            found = node.outputs[0]
            self._insert_behind(found, [ir.node("Gather", [found, self._text_indices], {"axis": 0})])
        for linear in added:
            if any(delta.rank for delta in self._deltas.get(linear.weight.name, ())):
                self._add(linear, self._deltas[linear.weight.name])
        for lengths in {node.inputs[LENGTHS]: None for node in attentions}:
            self._insert_behind(lengths, [ir.node("Gather", [lengths, self._text_indices], {"axis": 0})])
        self._split_logits()
        self._clear_shapes()

    def _compute_row_indices(self) -> None:
        """Compute the text and the member of each row: int64 [batch * members]."""
        ids = next(value for value in self._graph.inputs if value.name == graph_io.INPUT_IDS)
        zero, one, members = (self._scalar(number) for number in (0, 1, self._members))
        batch = ir.node("Shape", [ids], {"end": 1})
        count = ir.node("Mul", [batch.outputs[0], members])
        scalar = ir.node("Squeeze", [count.outputs[0]])
        rows = ir.node("Range", [zero, scalar.outputs[0], one])
        texts, member_of_row = (ir.node(kind, [rows.outputs[0], members]) for kind in ("Div", "Mod"))
        self._graph.insert_before(self._graph[0], [batch, count, scalar, rows, texts, member_of_row])
        self._text_indices, self._member_indices, self._last_index_node = (
            texts.outputs[0],
            member_of_row.outputs[0],
            member_of_row,
        )

    def _add(self, linear: Linear, deltas: Sequence[Delta]) -> None:
        """Add the members' low-rank products to a linear's output."""
        name, made = linear.weight.name, linear.node.outputs[0]
        ranks = tuple(delta.rank for delta in deltas)
        parts = addition_matrices(deltas)
        down, up = (
            add_initializer(self._graph, own, matrix.T)
            for own, matrix in zip((f"{name}.down", addition(name)), parts, strict=True)
        )
        low = ir.node("MatMul", [linear.node.inputs[0], down])
        own = ir.node("Mul", [low.outputs[0], self._ownership(ranks)])
        wide = ir.node("MatMul", [own.outputs[0], up])
        total = ir.node("Add", [made, wide.outputs[0]])
        self._insert_behind(made, [low, own, wide, total])

    def _ownership(self, ranks: tuple[int, ...]) -> ir.Value:
        """Return 1 where a column belongs to the row's member, else 0: float32 [batch * members, 1, sum of ranks]."""
        if ranks not in self._masks:
            owner = np.repeat(np.arange(len(ranks)), ranks)
            pattern = (owner == np.arange(len(ranks))[:, None]).astype(np.float32)[:, None]
            value = add_initializer(self._graph, f"own.{'.'.join(map(str, ranks))}", pattern)
            mask = ir.node("Gather", [value, self._member_indices], {"axis": 0})
            self._graph.insert_after(self._last_index_node, mask)
            self._masks[ranks] = mask.outputs[0]
        return self._masks[ranks]

    def _split_logits(self) -> None:
        """Give the members of a text an axis of their own before the head."""
        last = head(self._graph)
        logits = next(value for value in self._graph.outputs if value.name == graph_io.LOGITS)
        batch, kept, vocabulary = logits.shape
        if last is None:
            raise EdgemixError("the graph's logits do not come from a known linear")
        hidden = last.node.inputs[0]
        by_token = ir.node("Transpose", [hidden], {"perm": [1, 0, 2]})
        parted = ir.node("Reshape", [by_token.outputs[0], self._constant(0, -1, self._members, last.matrix().shape[1])])
        by_text = ir.node("Transpose", [parted.outputs[0]], {"perm": [1, 0, 2, 3]})
        self._graph.insert_before(last.node, [by_token, parted, by_text])
        last.node.replace_input_with(0, by_text.outputs[0])
        logits.shape = ir.Shape([batch, kept, self._members, vocabulary])

    def _clear_shapes(self) -> None:
        """Clear dynamic axes inside the graph, where a text has as many rows as there are members now."""
        outputs = set(self._graph.outputs)
        for value in (value for node in self._graph for value in node.outputs if value not in outputs):
            if value.shape is not None:
                value.shape = ir.Shape([axis if isinstance(axis, int) else None for axis in value.shape])

    def _insert_behind(self, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Insert nodes that read a value behind it; its other readers read the last node's output instead."""
        last = nodes[-1].outputs[0]
        last.type = value.type
        inside = set(nodes)
        for use in list(value.uses()):
            if use.node not in inside:
                use.node.replace_input_with(use.idx, last)
        maker = value.producer()
        if maker is not None:
            self._graph.insert_after(maker, nodes)

    def _scalar(self, number: int) -> ir.Value:
        return add_initializer(self._graph, f"stack.scalar.{number}", np.array(number, np.int64))

    def _constant(self, *numbers: int) -> ir.Value:
        if numbers not in self._constants:
            name = "stack." + ".".join(map(str, numbers))
            self._constants[numbers] = add_initializer(self._graph, name, np.array(numbers, np.int64))
        return self._constants[numbers]
