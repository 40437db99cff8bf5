"""Several members in one decoder graph: the base's weights are read once for all of them, and each has a row.

Every activation [batch, tokens, K] becomes [batch, tokens * members, K], a token's members next to each other, so that
what works on rows (linears, norms, activation functions) stays as it is. A linear gets beside it

    y + ((x down^T) * own) up^T,     down [members * rank, K],   up [N, members * rank],

where `own` keeps of each row what its member's part of `down` has made. In attention the members are more heads, not
more sequences: queries [batch, tokens, members * heads * size] and as many times the key-value heads. So one sequence
of several members takes several new tokens after a past, which GroupQueryAttention refuses to several sequences, and
the cache [batch, members * heads, past, size] is one like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemix import graph_io
from edgemix.errors import EdgemixError, InputError
from edgemix.export.quantization.emission import add_initializer
from edgemix.export.quantization.weights import linears, lookups

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.export.quantization.blocks import Matrix
    from edgemix.export.quantization.weights import Linear
    from edgemix.export.stacking.deltas import Delta


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
        for node in list(lookups(graph)):
            self._repeat(node)
        for linear in added:
            if any(delta.rank for delta in self._deltas.get(linear.weight.name, ())):
                self._add(linear, self._deltas[linear.weight.name])
        for node in attentions:
            self._widen(node)
        self._keep()
        self._part_logits()
        self._forget_shapes()

    def _repeat(self, lookup: ir.Node) -> None:
        """Give every token of an embedding [batch, tokens, hidden] a row for each member."""
        found = lookup.outputs[0]
        hidden = lookup.inputs[0].const_value.shape[1]
        apart = ir.node("Unsqueeze", [found, self._constant(2)])
        rows = ir.node("Expand", [apart.outputs[0], self._constant(1, 1, self._members, 1)])
        joined = ir.node("Reshape", [rows.outputs[0], self._constant(0, -1, hidden)])
        self._behind(found, [apart, rows, joined])

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
        """1 where a row's member has made a column, and 0 elsewhere: float32 [1, tokens * members, sum of ranks]."""
        if ranks not in self._masks:
            owner = np.repeat(np.arange(len(ranks)), ranks)
            pattern = (owner == np.arange(len(ranks))[:, None]).astype(np.float32)[None]
            tokens = next(value for value in self._graph.inputs if value.name == graph_io.INPUT_IDS)
            shape = ir.node("Shape", [tokens], {"start": 1, "end": 2})
            one = self._constant(1)
            repeats = ir.node("Concat", [one, shape.outputs[0], one], {"axis": 0})
            pattern_value = add_initializer(self._graph, f"own.{'.'.join(map(str, ranks))}", pattern)
            mask = ir.node("Tile", [pattern_value, repeats.outputs[0]])
            self._graph.insert_before(self._graph[0], [shape, repeats, mask])
            self._masks[ranks] = mask.outputs[0]
        return self._masks[ranks]

    def _widen(self, node: ir.Node) -> None:
        """Turn the members' rows of queries, keys and values into heads of one row, and back behind the attention."""
        attributes = node.attributes
        heads, pairs = attributes.get_int("num_heads", 0), attributes.get_int("kv_num_heads", 0)
        size = next(value for value in self._graph.inputs if value is node.inputs[3]).shape[3]
        widths = (heads * size, pairs * size, pairs * size)
        parts = list(node.inputs[:3])
        before: list[ir.Node] = []
        if parts[1] is None:
            split = ir.node("Split", [parts[0], self._constant(*widths)], {"axis": -1}, num_outputs=3)
            before.append(split)
            parts = list(split.outputs)
        for place, (part, width) in enumerate(zip(parts, widths, strict=True)):
            reshaped = ir.node("Reshape", [part, self._constant(0, -1, self._members * width)])
            before.append(reshaped)
            node.replace_input_with(place, reshaped.outputs[0])
        self._graph.insert_before(node, before)
        attributes["num_heads"] = ir.AttrInt64("num_heads", heads * self._members)
        attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", pairs * self._members)
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            batch, _, places, _ = value.shape
            value.shape = ir.Shape([batch, pairs * self._members, places, size])
        made = node.outputs[0]
        made.shape = None
        self._behind(made, [ir.node("Reshape", [made, self._constant(0, -1, heads * size)])])

    def _keep(self) -> None:
        """As many rows of the last tokens as these have."""
        keep = next((value for value in self._graph.inputs if value.name == graph_io.LOGITS_TO_KEEP), None)
        if keep is None:
            return
        uses = list(keep.uses())
        rows = ir.node("Mul", [keep, self._constant(self._members)])
        for use in uses:
            use.node.replace_input_with(use.idx, rows.outputs[0])
        self._graph.insert_before(self._graph[0], rows)

    def _part_logits(self) -> None:
        logits = next(value for value in self._graph.outputs if value.name == graph_io.LOGITS)
        batch, kept, vocabulary = logits.shape
        node = logits.producer()
        if node is None:
            raise EdgemixError("the graph's logits are made by nothing")
        parted = ir.node("Reshape", [logits, self._constant(0, -1, self._members, vocabulary)])
        parted.outputs[0].type = logits.type
        self._graph.insert_after(node, parted)
        logits.name, parted.outputs[0].name = "logits.rows", graph_io.LOGITS
        parted.outputs[0].shape = ir.Shape([batch, kept, self._members, vocabulary])
        logits.shape = ir.Shape([batch, None, vocabulary])
        self._graph.outputs[list(self._graph.outputs).index(logits)] = parted.outputs[0]

    def _forget_shapes(self) -> None:
        """Inside the graph, what was as long as the text is longer now."""
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

    def _constant(self, *numbers: int) -> ir.Value:
        if numbers not in self._constants:
            name = "stack." + ".".join(map(str, numbers))
            self._constants[numbers] = add_initializer(self._graph, name, np.array(numbers, np.int64))
        return self._constants[numbers]
