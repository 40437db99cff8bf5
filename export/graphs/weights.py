"""Find the weights among a graph's initializers, by the graph's structure and never by names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgemix.bundle.graph_io import INPUT_IDS, LOGITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


Matrix: TypeAlias = NDArray[np.float32]

SMALLEST = 16
"""Matrices with fewer rows or columns stay float: blocks would not fit, and there is nothing to gain."""


@dataclass(frozen=True)
class Linear:
    """A MatMul or Gemm with a constant weight.

    Attributes:
        node: The node.
        weight: The initializer.
        transposed: Whether the initializer is stored [out, in] (read through a Transpose, or by Gemm's transB).
        bias: Gemm's third input.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None = None

    @property
    def outputs(self) -> int:
        """Number of outputs, N."""
        return int(self.weight.const_value.shape[0 if self.transposed else 1])

    def matrix(self) -> Matrix:
        """Return the weight as contiguous float32 [N, K] (outputs, inputs)."""
        stored = self.weight.const_value.numpy()
        return np.ascontiguousarray(stored if self.transposed else stored.T)


def linears(graph: ir.Graph) -> Iterator[Linear]:
    """Yield every MatMul and plain Gemm whose right side is a float matrix among the initializers."""
    for node in graph:
        if node.domain == "" and node.op_type in ("MatMul", "Gemm"):
            linear = _linear(node)
            if linear is not None:
                yield linear


def by_activation(found: Iterable[Linear]) -> list[list[Linear]]:
    """Group linears by the activation that they read, in the graph's order."""
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in found:
        readers.setdefault(linear.node.inputs[0], []).append(linear)
    return [*readers.values()]


def lookups(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield every Gather of a float matrix's rows by token ids: the embeddings, not positions or rotary tables."""
    for node in graph:
        if (
            node.domain == ""
            and node.op_type == "Gather"
            and node.attributes.get_int("axis", 0) == 0
            and is_float_matrix(node.inputs[0])
            and _are_token_ids(node.inputs[1])
        ):
            yield node


def head(graph: ir.Graph) -> Linear | None:
    """Return the linear that computes `logits`: the last one before them, behind casts, caps and scalings."""
    value = next((output for output in graph.outputs if output.name == LOGITS), None)
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("MatMul", "Gemm"):
            return _linear(node)
        value = next((i for i in node.inputs if i is not None and i.const_value is None), None)
    return None


def is_float_matrix(value: ir.Value | None) -> bool:
    """Return whether a value is a float32 initializer of two dimensions that is large enough to quantize."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == 2
        and min(value.const_value.shape.numpy()) >= SMALLEST
    )


def _linear(node: ir.Node) -> Linear | None:
    weight, transposed, bias = node.inputs[1], False, None
    if node.op_type == "Gemm":
        attributes = node.attributes
        if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) != 1.0:
            return None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and attributes.get_float("beta", 1.0) != 1.0:
            return None
        transposed = bool(attributes.get_int("transB", 0))
    source = weight.producer() if weight is not None else None
    if source is not None and source.op_type == "Transpose":  # a matrix has only one permutation but the identity
        weight, transposed = source.inputs[0], not transposed
    return Linear(node, weight, transposed, bias) if is_float_matrix(weight) else None


def _are_token_ids(value: ir.Value | None) -> bool:
    """Return whether indices are the graph's input ids [batch, sequence], perhaps cast or reshaped to that shape."""
    if value is None or value.shape is None or value.shape.rank() != 2:
        return False
    while (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Reshape"):
            return False
        value = node.inputs[0]
    return bool(value.name == INPUT_IDS)
