"""Check a graph before ONNX Runtime sees it: operators that compute without loops, and sizes that are what they say.

A graph is refused that has an operator which is not in `OPERATORS`, a subgraph, a function, a sparse or string tensor,
a tensor whose data are not as long as its shape says, a name that is no text, an integer that could be the size of an
enormous tensor, or one of protobuf's ambiguities (a field twice that may be there once). What a graph allocates while
it runs cannot be bounded so: operators may compute the shapes of others.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from edgemix.bundle.external_data import MAX_FIELDS, location_as_stored, opened_graph, place_of, read_entry
from edgemix.bundle.protobuf import MalformedError, field, varint

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from edgemix.bundle.protobuf import Field


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPERATORS = {
    "": _names("""
        Abs Add And ArgMax ArgMin Attention Cast Ceil Clip Concat Constant ConstantOfShape Cos CumSum
        DequantizeLinear Div DynamicQuantizeLinear Einsum Equal Erf Exp Expand Floor Gather GatherElements GatherND Gelu
        Gemm Greater GreaterOrEqual Identity IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
        LogSoftmax MatMul MatMulInteger Max Min Mod Mul Neg NonZero Not OneHot Or Pad Pow QuantizeLinear
        RMSNormalization Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu
        Reshape RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign Sin Slice Softmax Softplus
        Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu Unsqueeze Where
    """),
    "com.microsoft": _names("""
        BiasGelu DequantizeLinear FastGelu FusedMatMul GatherBlockQuantized Gelu GroupQueryAttention MatMulBnb4
        MatMulIntegerToFloat MatMulNBits MultiHeadAttention QuantizeLinear QuickGelu RotaryEmbedding
        SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization
    """),
}
"""Domain -> operators that a graph may have, which exporters make models of: none loops, has a subgraph, draws random
numbers, or reads strings. A kind of model that needs another adds it here."""
OPERATORS["ai.onnx"] = OPERATORS[""]

MAX_NODES = 1 << 17
MAX_NAME = 1_024
"""Bytes of a name; the exporters' longest has some 150."""
MAX_INTEGER = 1 << 26
"""Largest integer that may be a size: `manifest_validation.MAX_CONTEXT`, and more rows than any vocabulary has."""
UNLIMITED = 1 << 40
"""Integers from here on mean "all"; as a size, no machine allocates them."""
MAX_ELEMENTS = 1 << 26
"""Elements of a tensor that is made of nothing but a constant shape."""
_SMALL = 64
"""Elements up to which a tensor of integers may be a shape; larger ones are tables."""

_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
         17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4}  # fmt: skip
"""ONNX's number of a dtype -> its bits; strings and complex numbers are not used here."""
_INT32, _INT64 = 6, 7
_SHAPES = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
"""Operator -> which of its inputs is the shape of a tensor that it makes."""
_BINARY = frozenset({"Max", "Min"})
"""Operators of any number of inputs: with one left out, or three that do not fit, they crash ONNX Runtime 1.32."""
_EQUATION = re.compile(r"[a-z]{1,8}(,[a-z]{1,8})?->[a-z]{1,8}")
"""Equations of Einsum."""
_NATURAL = frozenset({"batch_dims"})
"""Attributes whose negative numbers abort ONNX Runtime 1.32 (GatherND)."""
_REFUSED = {
    "ModelProto": {20: "training graphs", 25: "functions"},
    "GraphProto": {15: "sparse tensors"},
    "AttributeProto": {
        6: "a subgraph", 10: "lists of tensors", 11: "subgraphs", 14: "types", 15: "types",
        21: "references to attributes", 22: "sparse tensors", 23: "sparse tensors",
    },
    "TensorProto": {3: "segments", 6: "strings"},
    "TypeProto": {4: "sequences", 5: "maps", 8: "sparse tensors", 9: "optional values"},
}  # fmt: skip
"""Message of onnx.proto -> number of a field that no graph of ours has -> what it holds."""


class _Tensor(NamedTuple):
    """A constant: its name, and its values where it may be a shape."""

    name: str
    values: tuple[int, ...] | None
    location: str | None


class _Node(NamedTuple):
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constant: _Tensor | None


def verify_graph(graph: Path) -> frozenset[str]:
    """Check a graph, and return the files that it takes weights from, relative to its folder, as they are stored.

    Raises:
        BundleError: It is no sound ONNX model, has what none of ours has, or takes weights from where it must not.
    """
    with opened_graph(graph) as data:
        found = _Checker(data, graph)
        found.model()
    return frozenset(location_as_stored(graph, location) for location in found.locations)


class _Checker:
    """Reads a graph; every field is visited once."""

    def __init__(self, data: mmap.mmap, graph: Path) -> None:
        self._data, self._graph = data, graph
        self._left = MAX_FIELDS
        self._sizes: dict[str, int] = {}
        self.locations: set[str] = set()

    def model(self) -> None:
        graphs = [found for found in self._fields("ModelProto", 0, len(self._data)) if found.number == 7]
        if len(graphs) != 1:
            raise MalformedError(f"it has {len(graphs)} graphs")
        nodes: list[_Node] = []
        constants: dict[str, tuple[int, ...]] = {}
        for found in self._fields("GraphProto", *self._inside(graphs[0])):
            if found.number == 1:
                nodes.append(self._node(found))
                if len(nodes) > MAX_NODES:
                    raise MalformedError(f"it has more than {MAX_NODES:,} nodes")
            elif found.number == 5:
                tensor = self._tensor(found)
                if tensor.values is not None:
                    constants[tensor.name] = tensor.values
            elif found.number in (11, 12):
                self._value(found)
        constants |= {
            node.outputs[0]: node.constant.values
            for node in nodes
            if node.outputs and node.constant is not None and node.constant.values is not None
        }
        for node in nodes:
            _check_sizes(node, constants)

    def _fields(self, message: str, start: int, end: int, once: Sequence[int] = ()) -> Iterable[Field]:
        """Yield the fields of a message; none of those that are refused, and those of `once` not twice."""
        refused, seen = _REFUSED.get(message, {}), set()
        while start < end:
            found = field(self._data, start, end)
            start = found.end
            self._left -= 1
            if self._left < 0:
                raise MalformedError(f"it has more than {MAX_FIELDS:,} fields")
            if found.number in refused:
                raise MalformedError(f"it has {refused[found.number]}, which no graph of edgemix has")
            if found.number in once:
                if found.number in seen:
                    raise MalformedError(f"it has twice the field {found.number} of a {message}")
                seen.add(found.number)
            yield found

    def _inside(self, found: Field) -> tuple[int, int]:
        if found.start is None:
            raise MalformedError(f"its field {found.number} before byte {found.end:,} is no message")
        return found.start, found.end

    def _text(self, found: Field) -> str:
        start, end = self._inside(found)
        if end - start > MAX_NAME:
            raise MalformedError(f"it has a name of {end - start:,} bytes, and may have {MAX_NAME:,}")
        try:
            return self._data[start:end].decode()
        except UnicodeDecodeError:
            raise MalformedError(f"it has a name that is no UTF-8: {self._data[start:end]!r:.80}") from None

    def _node(self, node: Field) -> _Node:
        texts: dict[int, str] = {}
        inputs, outputs, tensors, largest = [], [], [], 0
        for found in self._fields("NodeProto", *self._inside(node), once=(3, 4, 7, 8)):
            if found.number == 1:
                inputs.append(self._text(found))
            elif found.number == 2:
                outputs.append(self._text(found))
            elif found.number == 5:
                made, numbers = self._attribute(found)
                tensors += made
                largest = max(largest, *map(abs, numbers), 0)
            elif found.number in (3, 4, 7, 8):
                texts[found.number] = self._text(found)
        operator, domain = texts.get(4, ""), texts.get(7, "")
        if operator not in OPERATORS.get(domain, ()) or texts.get(8):
            name = f"{domain}.{operator}" if domain else operator
            raise MalformedError(f"it has the operator {name[:80]!r}, which no graph of edgemix has")
        if largest > MAX_INTEGER and operator != "Constant":  # kernels take 32 bits of it
            raise MalformedError(f"a {operator} has the integer {largest:,} in an attribute; at most {MAX_INTEGER:,}")
        if operator in _BINARY and (len(inputs) != 2 or "" in inputs):
            raise MalformedError(f"it has a {operator} of the inputs {inputs!r:.80}; it takes two")
        constant = tensors[0] if operator == "Constant" and tensors else None
        return _Node(operator, tuple(inputs), tuple(outputs), constant)

    def _attribute(self, attribute: Field) -> tuple[list[_Tensor], list[int]]:
        """Check an attribute, and return the tensor that it is, or the integers as one, and the integers."""
        tensors, numbers, name, text = [], [], "", ""
        for found in self._fields("AttributeProto", *self._inside(attribute), once=(1, 2, 3, 4, 5, 20)):
            if found.number == 1:
                name = self._text(found)
            elif found.number == 4:
                text = self._text(found)
            elif found.number == 5:
                tensors.append(self._tensor(found))
            elif found.number in (3, 8):
                numbers += self._integers(found)
        _check_integers(numbers)
        if name in _NATURAL and any(number < 0 for number in numbers):
            raise MalformedError(f"its attribute {name} is negative")
        if name == "equation" and not _EQUATION.fullmatch(text):
            raise MalformedError(f"its equation is {text!r:.80}, and not of one or two factors, an axis a letter")
        return tensors or ([_Tensor("", tuple(numbers), None)] if numbers else []), numbers

    def _integers(self, found: Field) -> list[int]:
        """Return the numbers of a field of int64 values, packed or not."""
        if found.value is not None:
            return [_signed(found.value)]
        numbers, (place, end) = [], self._inside(found)
        while place < end:
            number, place = varint(self._data, place, end)
            numbers.append(_signed(number))
        return numbers

    def _tensor(self, tensor: Field) -> _Tensor:
        dims: list[int] = []
        data: list[Field] = []
        entries: dict[str, str] = {}
        name, dtype, external = "", 0, False
        for found in self._fields("TensorProto", *self._inside(tensor), once=(2, 8, 9, 14)):
            if found.number == 1:
                dims += self._integers(found)
            elif found.number == 2:
                dtype = found.value or 0
            elif found.number == 8:
                name = self._text(found)
            elif found.number in (4, 5, 7, 9, 10, 11):
                data.append(found)
            elif found.number == 13:
                read_entry(self._data, *self._inside(found), entries)
            elif found.number == 14:
                external = found.value == 1
        where = f"its tensor {name[:80]!r}"
        if dtype not in _BITS or any(dim < 0 for dim in dims):
            raise MalformedError(f"{where} has the dtype {dtype} and the shape {dims[:8]}")
        count = math.prod(dims)
        size = (count * _BITS[dtype] + 7) // 8
        if external or entries:
            place = place_of(self._graph, entries, self._sizes)
            self.locations.add(place.location)
            if not external or data or place.length != size:
                raise MalformedError(f"{where} needs {size:,} bytes, and takes {place.length:,} from a file")
            return _Tensor(name, None, place.location)
        small = dtype in (_INT32, _INT64) and count <= _SMALL
        values = self._stored(data, dtype, count, size, where, small=small)
        if values is not None:
            _check_integers(values)
        return _Tensor(name, values, None)

    def _stored(
        self, data: Sequence[Field], dtype: int, count: int, size: int, where: str, *, small: bool
    ) -> tuple[int, ...] | None:
        """Check the size of data within the graph, and return the values where they are few integers."""
        numbers = {found.number for found in data}
        if len(numbers) > 1:
            raise MalformedError(f"{where} has its data twice")
        if numbers == {9}:
            start, end = self._inside(data[0])
            if end - start != size:
                raise MalformedError(f"{where} needs {size:,} bytes, and has {end - start:,}")
            width = _BITS[dtype] // 8
            if not small:
                return None
            raw = self._data[start:end]
            return tuple(int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, size, width))
        values: list[int] = []
        found_count = 0
        for found in data:
            width = {4: 4, 10: 8}.get(found.number, 0)
            if width and found.start is not None:
                found_count += (found.end - found.start) // width
            elif width:
                found_count += 1
            else:
                numbers_here = self._integers(found)
                found_count += len(numbers_here)
                if small:
                    values += numbers_here
        needed = (count + 1) // 2 if _BITS[dtype] == 4 else count
        if found_count != needed:
            raise MalformedError(f"{where} needs {needed:,} values, and has {found_count:,}")
        return tuple(values) if small else None

    def _value(self, value: Field) -> None:
        """Check the name and type of an input or output."""
        for found in self._fields("ValueInfoProto", *self._inside(value), once=(1, 2)):
            if found.number == 1:
                self._text(found)
            elif found.number == 2:
                for kind in self._fields("TypeProto", *self._inside(found), once=(1,)):
                    if kind.number == 1:
                        self._shape(kind)

    def _shape(self, kind: Field) -> None:
        for part in self._fields("TypeProto.Tensor", *self._inside(kind), once=(1, 2)):
            if part.number != 2:
                continue
            for dim in self._fields("TensorShapeProto", *self._inside(part)):
                for found in self._fields("Dimension", *self._inside(dim), once=(1, 2)):
                    if found.number == 2:
                        self._text(found)
                    elif found.number == 1 and not 0 <= _signed(found.value or 0) <= MAX_INTEGER:
                        raise MalformedError(f"an input or output has an axis of {_signed(found.value or 0):,}")


def _signed(value: int) -> int:
    """Return the int64 that a varint stands for."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _check_integers(values: Iterable[int]) -> None:
    for value in values:
        if MAX_INTEGER < abs(value) < UNLIMITED:
            raise MalformedError(
                f"it has the integer {value:,}; sizes are at most {MAX_INTEGER:,}, and {UNLIMITED:,} or more means all"
            )


def _check_sizes(node: _Node, constants: dict[str, tuple[int, ...]]) -> None:
    """Bound what a node makes of a constant shape."""
    at = _SHAPES.get(node.operator)
    if node.operator == "Range":
        values = [constants.get(name) for name in node.inputs]
        shape: tuple[int, ...] | None = None
        if values[1:2] != [None] and len(values) > 1 and values[1]:
            shape = (abs(values[1][0]),)
    else:
        shape = constants.get(node.inputs[at]) if at is not None and len(node.inputs) > at else None
    if shape and math.prod(abs(axis) for axis in shape) > MAX_ELEMENTS:
        raise MalformedError(
            f"a {node.operator} makes a tensor of the shape {shape}, of more than {MAX_ELEMENTS:,} elements"
        )
