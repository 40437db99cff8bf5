"""The work in a graph, read from its file without ONNX Runtime: the part of the model of each node, the bytes of
weights that a call reads, and the multiply-adds per token.
"""

from __future__ import annotations

import math
import mmap
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgemix.bundle import graph_io
from edgemix.bundle.external_data import MAX_FIELDS
from edgemix.bundle.protobuf import MalformedError, fields, varint
from edgemix.errors import BundleError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from edgemix.bundle.protobuf import Data

    Weight = tuple[int, tuple[int, ...]]

EMBEDDING, HEAD, OTHER = "embedding", "head", "other"

_LAYER = re.compile(
    rf"(?:^|[._/])(?:layers?|h|blocks?)[._](\d+)(?![0-9A-Za-z])|^{re.escape(graph_io.PAST_PREFIX)}(\d+)\."
)
_EMBEDDING = re.compile(r"(?:^|[._/])(?:embed_tokens|wte|embed_in|word_embeddings)\b")
_HEAD = re.compile(r"(?:^|[._/])(?:lm_head|embed_out|norm|ln_f|final_layer_?norm|final_norm)\b")
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_PRODUCTS = frozenset(
    {
        *("MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "QLinearMatMul"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4"),
    }
)
_ALTERED = frozenset({"Transpose", "Cast", "Identity", "DequantizeLinear"})
_ATTENTION = "GroupQueryAttention"
# Bits of onnx.proto's TensorProto.DataType that weights have.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a graph."""

    type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, int]


@dataclass
class Graph:
    """A graph's nodes, in order, and its weights: name -> (data type, dimensions)."""

    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)

    def marks(self) -> dict[str, str]:
        """Return node name -> mark, see `mark`."""
        return {node.name: mark(node) for node in self.nodes if node.name}

    def weight_bytes(self) -> int:
        """Return the bytes of weights that a call of one token reads: all but tables that are only looked up."""
        read = {name for node in self.nodes if node.type not in _LOOKUPS for name in node.inputs}
        return sum(self._bytes(name) for name in self.weights.keys() & read)

    def multiply_adds(self) -> int:
        """Return the multiply-adds per token in products with weights."""
        weights = dict(self.weights)
        for node in self.nodes:
            if node.type in _ALTERED and node.inputs and node.inputs[0] in weights:
                weights[node.outputs[0]] = weights[node.inputs[0]]
        return sum(_product(node, weights) for node in self.nodes)

    @property
    def query_heads(self) -> int:
        """Query heads of all layers together; 0 for graphs without fused attention."""
        return sum(node.numbers.get("num_heads", 0) for node in self.nodes if node.type == _ATTENTION)

    def _bytes(self, name: str) -> int:
        kind, shape = self.weights[name]
        return math.prod(shape) * _BITS.get(kind, 0) // 8


def _product(node: Node, weights: Mapping[str, Weight]) -> int:
    """Return the multiply-adds per token of one node."""
    if node.type in {"MatMulNBits", "MatMulBnb4"}:
        return node.numbers.get("K", 0) * node.numbers.get("N", 0)
    if node.type not in _PRODUCTS:
        return 0
    return max((math.prod(weights[name][1]) for name in node.inputs if name in weights), default=0)


def mark(node: Node) -> str:
    """Return the part of the model by a node's names: "layer 0" ..., "embedding", "head"; else ""."""
    own = (node.name, *node.outputs)
    if layer := _layer(own):
        return layer
    if graph_io.LOGITS in node.outputs or any(map(_HEAD.search, own)):
        return HEAD
    if any(map(_EMBEDDING.search, own)) or node.type == "GatherBlockQuantized":
        return EMBEDDING
    return _layer(node.inputs)


def mark_of_name(name: str) -> str:
    """As `mark`, of a node that ONNX Runtime has made itself."""
    return mark(Node("", name, (), (), {}))


def _layer(names: Iterable[str]) -> str:
    found = next((match for name in names if (match := _LAYER.search(name))), None)
    return f"layer {int(found[1] or found[2])}" if found else ""


def spread(marks: Iterable[str]) -> list[str]:
    """Every node's part, from marks in the order of execution: one without belongs where the last one before it did,
    and to "other" before the first layer.
    """
    parts, current = [], OTHER
    for part in marks:
        if part and part != EMBEDDING:
            current = part
        parts.append(part or current)
    return parts


def read_graph(path: Path) -> Graph:
    """A graph from its file; weights are jumped over.

    Raises:
        BundleError: It is no ONNX model.
    """
    with (
        storage_errors(f"reading {path}"),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            return _graph(data)
        except (MalformedError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: is no sound ONNX model: {error}", "Export the bundle again.") from None


def _graph(data: mmap.mmap) -> Graph:
    graph, count = Graph(), 0
    for number, _, start, end in fields(data, 0, len(data)):
        if number != 7 or start is None:
            continue
        for inner, _, begin, stop in fields(data, start, end):
            count += 1
            if count > MAX_FIELDS:
                raise MalformedError(f"it has more than {MAX_FIELDS:,} fields")
            if begin is not None and inner == 1:
                graph.nodes.append(_node(data, begin, stop))
            elif begin is not None and inner == 5:
                name, weight = _tensor(data, begin, stop)
                graph.weights[name] = weight
    return graph


def _node(data: Data, position: int, end: int) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    numbers: dict[str, int] = {}
    for number, _, start, stop in fields(data, position, end):
        if start is None:
            continue
        if number in texts:
            texts[number].append(data[start:stop].decode())
        elif number == 5:
            name, value = _attribute(data, start, stop)
            if value is not None:
                numbers[name] = value
    return Node("".join(texts[4]), "".join(texts[3]), tuple(texts[1]), tuple(texts[2]), numbers)


def _attribute(data: Data, position: int, end: int) -> tuple[str, int | None]:
    name, found = "", None
    for number, value, start, stop in fields(data, position, end):
        if number == 1 and start is not None:
            name = data[start:stop].decode()
        elif number == 3:
            found = value
    return name, found


def _tensor(data: Data, position: int, end: int) -> tuple[str, Weight]:
    name, kind, shape = "", 0, []
    for number, value, start, stop in fields(data, position, end):
        if number == 1 and value is not None:
            shape.append(value)
        elif number == 1 and start is not None:
            shape += _packed(data, start, stop)
        elif number == 2 and value is not None:
            kind = value
        elif number == 8 and start is not None:
            name = data[start:stop].decode()
    return name, (kind, tuple(shape))


def _packed(data: Data, position: int, end: int) -> list[int]:
    numbers = []
    while position < end:
        number, position = varint(data, position, end)
        numbers.append(number)
    return numbers
