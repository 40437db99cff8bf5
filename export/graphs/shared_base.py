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
from edgemix.export.graphs.batch_invariant_attention import LENGTHS, steady_attention
from edgemix.export.graphs.rewrites import add_initializer
from edgemix.export.graphs.weights import head, linears, lookups

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.export.graphs.deltas import Delta
    from edgemix.export.graphs.weights import Linear, Matrix


def stack(graph: ir.Graph, deltas: Mapping[str, Sequence[Delta]], members: int) -> None:
    """Let a base's fp32 decoder graph speak for several members: logits [batch, kept, members, vocabulary].

    Args:
        graph: Of the base, with a shared cache; changed in place.
        deltas: What members add to its weights, as `find_deltas` tells.
        members: How many.

    Raises:
        InputError: The graph's attention is not GroupQueryAttention, or it adds positions to its embeddings.
    """
    _Stack(graph, deltas, members).run()
    steady_attention(graph)  # which takes several tokens of several texts, too


def addition_matrices(deltas: Sequence[Delta]) -> tuple[Matrix, Matrix]:
    """The members' additions to one linear, side by side: down [sum of ranks, K] and up [N, sum of ranks]."""
    down = np.concatenate([delta.down for delta in deltas])
    return down, np.ascontiguousarray(np.concatenate([delta.up for delta in deltas], axis=1))


def addition(name: str) -> str:
    """The name of what is multiplied last of the additions to a weight of that name, [sum of ranks, N]."""
    return f"{name}.up"


class _Stack:
    """One rewriting under way."""

    def __init__(self, graph: ir.Graph, deltas: Mapping[str, Sequence[Delta]], members: int) -> None:
        self._graph, self._deltas, self._members = graph, deltas, members
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self._masks: dict[tuple[int, ...], ir.Value] = {}

    def run(self) -> None:
        graph = self._graph
        attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
        if not attentions or any(value.name == graph_io.POSITION_IDS for value in graph.inputs):
            raise InputError("members can be stacked only where GroupQueryAttention is all that knows of positions")
        added = list(linears(graph))
        self._count_rows()
        for node in list(lookups(graph)):
            found = node.outputs[0]
            self._behind(found, [ir.node("Gather", [found, self._texts], {"axis": 0})])
        for linear in added:
            if any(delta.rank for delta in self._deltas.get(linear.weight.name, ())):
                self._add(linear, self._deltas[linear.weight.name])
        for lengths in {node.inputs[LENGTHS]: None for node in attentions}:
            self._behind(lengths, [ir.node("Gather", [lengths, self._texts], {"axis": 0})])
        self._part_logits()
        self._forget_shapes()

    def _count_rows(self) -> None:
        """Of each row, which text and which member it is: int64 [batch * members]."""
        ids = next(value for value in self._graph.inputs if value.name == graph_io.INPUT_IDS)
        zero, one, members = (self._scalar(number) for number in (0, 1, self._members))
        batch = ir.node("Shape", [ids], {"end": 1})
        count = ir.node("Mul", [batch.outputs[0], members])
        scalar = ir.node("Squeeze", [count.outputs[0]])
        rows = ir.node("Range", [zero, scalar.outputs[0], one])
        texts, voices = (ir.node(kind, [rows.outputs[0], members]) for kind in ("Div", "Mod"))
        self._graph.insert_before(self._graph[0], [batch, count, scalar, rows, texts, voices])
        self._texts, self._voices, self._counted = texts.outputs[0], voices.outputs[0], voices

    def _add(self, linear: Linear, deltas: Sequence[Delta]) -> None:
        """Put the members' additions beside a linear."""
        name, made = linear.weight.name, linear.node.outputs[0]
        ranks = tuple(delta.rank for delta in deltas)
        parts = addition_matrices(deltas)
        down, up = (
            add_initializer(self._graph, own, matrix.T)
            for own, matrix in zip((f"{name}.down", addition(name)), parts, strict=True)
        )
        thin = ir.node("MatMul", [linear.node.inputs[0], down])
        own = ir.node("Mul", [thin.outputs[0], self._own(ranks)])
        wide = ir.node("MatMul", [own.outputs[0], up])
        total = ir.node("Add", [made, wide.outputs[0]])
        self._behind(made, [thin, own, wide, total])

    def _own(self, ranks: tuple[int, ...]) -> ir.Value:
        """1 where a row's member has made a column, and 0 elsewhere: float32 [batch * members, 1, sum of ranks]."""
        if ranks not in self._masks:
            owner = np.repeat(np.arange(len(ranks)), ranks)
            pattern = (owner == np.arange(len(ranks))[:, None]).astype(np.float32)[:, None]
            value = add_initializer(self._graph, f"own.{'.'.join(map(str, ranks))}", pattern)
            mask = ir.node("Gather", [value, self._voices], {"axis": 0})
            self._graph.insert_after(self._counted, mask)
            self._masks[ranks] = mask.outputs[0]
        return self._masks[ranks]

    def _part_logits(self) -> None:
        """Put a text's members beside each other again, before the head reads them."""
        last = head(self._graph)
        logits = next(value for value in self._graph.outputs if value.name == graph_io.LOGITS)
        batch, kept, vocabulary = logits.shape
        if last is None:
            raise EdgemixError("the graph's logits are made by no linear that is known")
        hidden = last.node.inputs[0]
        by_token = ir.node("Transpose", [hidden], {"perm": [1, 0, 2]})
        parted = ir.node("Reshape", [by_token.outputs[0], self._constant(0, -1, self._members, last.matrix().shape[1])])
        by_text = ir.node("Transpose", [parted.outputs[0]], {"perm": [1, 0, 2, 3]})
        self._graph.insert_before(last.node, [by_token, parted, by_text])
        last.node.replace_input_with(0, by_text.outputs[0])
        logits.shape = ir.Shape([batch, kept, self._members, vocabulary])

    def _forget_shapes(self) -> None:
        """Inside the graph, there are as many rows of each text as members now."""
        outputs = set(self._graph.outputs)
        for value in (value for node in self._graph for value in node.outputs if value not in outputs):
            if value.shape is not None:
                value.shape = ir.Shape([axis if isinstance(axis, int) else None for axis in value.shape])

    def _behind(self, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Put nodes, the first of which read the value, behind it: what read it reads their last output now."""
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
