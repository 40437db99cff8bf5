"""SmoothQuant on a graph (Xiao et al., arXiv 2211.10438): channels that stand out are divided by a scale where they are
made, and the weights that read them are multiplied by it. The graph computes what it did; its activations round better.

        s_j = max|x_j|^a / max|W_j|^(1 - a),      x' = x / s,      W' = W s

`a` is chosen for each activation by the error of its own 8-bit products on calibration text. `awq` says how it differs
from the scales of 4-bit weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemix.export.quantization.algorithms.rtn import rtn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemix.export.graphs.weights import Linear, Matrix

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""On SmolLM2-135M 0.4 to 0.5 is best for attention's inputs, 0.7 for the gates', 0.5 for the products'."""

OUTLIER_COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of channels that are tried to be separated; a sixteenth of all at most, or nothing is gained."""

_NORMS: Mapping[str, tuple[int, ...]] = {
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
    "LayerNormalization": (1, 2),
    "SkipLayerNormalization": (2, 3),
}
"""Normalizations -> the inputs that are their gain and bias [K]."""

_TINY = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """The smoothing of one activation.

    Attributes:
        scale: float32 [K], the divisor of the activation; None leaves it as it is.
        error: Mean over tokens of |8-bit products - products|^2 / |products|^2, with the scale.
        spike: The largest |8-bit products - products| of a token, over the median token's |products|.
        outliers: Channels that stay out of the 8-bit products, as their sizes would be a token's only scale.
    """

    scale: Matrix | None
    error: float
    spike: float
    outliers: tuple[int, ...] = ()


def search(activation: Matrix, maxima: Matrix, weights: Sequence[Matrix], *, foldable: bool) -> Smoothing:
    """Find the scale of one activation with which its 8-bit products have the least error.

    Args:
        activation: float32 [tokens, K], to measure on.
        maxima: float32 [K], the largest magnitudes of each channel, over more text.
        weights: The float32 matrices [N, K] that read it.
        foldable: Whether a scale can be folded into what makes it; otherwise only the error is measured.
    """
    reach = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    exact = [activation @ weight.T for weight in weights]
    best = _measure(activation, weights, exact, None)
    for alpha in ALPHAS if foldable else ():
        scale = np.maximum(maxima, _TINY) ** alpha / np.maximum(reach, _TINY) ** (1 - alpha)
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        found = _measure(activation, weights, exact, scale)
        if found.error < best.error:
            best = found
    return best


def separate_outliers(activation: Matrix, weights: Sequence[Matrix], found: Smoothing, limit: float) -> Smoothing:
    """Take the largest channels out of the 8-bit products, as few as bring the largest error of a token under a limit
    (a part of the product in floating point, as in LLM.int8(), Dettmers et al., arXiv 2208.07339).

    Args:
        activation: float32 [tokens, K], to measure on.
        weights: The float32 matrices [N, K] that read it.
        found: From `search`, with a spike above the limit.
        limit: Of `Smoothing.spike`.

    Returns:
        `found` as it was if so few do not suffice.
    """
    scaled = activation if found.scale is None else activation / found.scale
    largest = np.argsort(-np.abs(scaled).max(axis=0), kind="stable")
    exact = [activation @ weight.T for weight in weights]
    for count in (count for count in OUTLIER_COUNTS if 16 * count <= activation.shape[1]):
        outliers = tuple(sorted(largest[:count].tolist()))
        better = _measure(activation, weights, exact, found.scale, outliers)
        if better.spike <= limit:
            return better
    return found


def quantize_rows(activation: Matrix) -> Matrix:
    """Return the activation [tokens, K] rounded to 8 bits with one scale a token, as the graph's products read it."""
    largest = np.maximum(np.abs(activation).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    rounded: Matrix = np.rint(activation / largest * np.float32(127)) * (largest / np.float32(127))
    return rounded


def folds(value: ir.Value, readers: int) -> list[tuple[ir.Value, int]] | None:
    """The initializers that must be divided, each with its axis, to divide an activation by a scale for each channel.

    Known makers are normalizations with a gain (as one node, or written out as a product with it), and products of
    which one factor comes straight from a linear (the `up` of a gated MLP).

    Args:
        value: The activation [..., K].
        readers: How many nodes are known to undo the division; with others the answer is None.

    Returns:
        None if nothing can be folded.
    """
    node = value.producer()
    if node is None or len(value.uses()) != readers or value.is_graph_output():
        return None
    if node.op_type in _NORMS and value is node.outputs[0]:
        places = [node.inputs[index] for index in _NORMS[node.op_type] if index < len(node.inputs)]
        return _constants([place for place in places if place is not None])
    if node.op_type == "Add":  # the bias of a normalization that is written out
        return _with_bias(node, lambda rest: folds(rest, 1))
    return _product_folds(node) if node.op_type == "Mul" else None


def divide(places: Sequence[tuple[ir.Value, int]], scale: Matrix) -> None:
    """Divide initializers by a scale along their axes."""
    for value, axis in places:
        array = value.const_value.numpy()
        shape = [1] * array.ndim
        shape[axis] = -1
        set_array(value, array / scale.reshape(shape))


def multiply(linear: Linear, scale: Matrix) -> None:
    """Multiply the columns of a linear's weight [N, K] by a scale [K]."""
    array = linear.weight.const_value.numpy()
    set_array(linear.weight, array * (scale if linear.transposed else scale[:, None]))


def set_array(value: ir.Value, array: np.ndarray) -> None:
    """Replace an initializer's values."""
    value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name)


def _measure(
    activation: Matrix,
    weights: Sequence[Matrix],
    exact: Sequence[Matrix],
    scale: Matrix | None,
    outliers: tuple[int, ...] = (),
) -> Smoothing:
    scaled = activation if scale is None else activation / scale
    rounded = quantize_rows(without(scaled, outliers))
    lost, power = np.zeros((2, len(activation)), np.float32)
    for weight, product in zip(weights, exact, strict=True):
        whole = weight if scale is None else weight * scale
        stored = rtn(without(whole, outliers), bits=8, block=whole.shape[1], symmetric=True).dequantized()
        made = rounded @ stored.T + scaled[:, outliers] @ whole[:, outliers].T
        lost += ((made - product) ** 2).sum(axis=1)
        power += (product**2).sum(axis=1)
    power = np.maximum(power, np.finfo(np.float32).tiny)
    return Smoothing(scale, float(np.mean(lost / power)), float(np.sqrt(lost.max() / np.median(power))), outliers)


def without(matrix: Matrix, columns: Sequence[int]) -> Matrix:
    """Return the matrix with zeros in some columns."""
    if not columns:
        return matrix
    rest = matrix.copy()
    rest[:, columns] = 0
    return rest


def _product_folds(node: ir.Node) -> list[tuple[ir.Value, int]] | None:
    """Return a constant factor, or else the linear that computes one of two factors."""
    gains = [factor for factor in node.inputs if _is_constant(factor)]
    if gains:
        return _constants(gains)
    made = (_linear_weights(factor) for factor in node.inputs if len(factor.uses()) == 1)
    return next((places for places in made if places), None)


def _with_bias(
    node: ir.Node, below: Callable[[ir.Value], list[tuple[ir.Value, int]] | None]
) -> list[tuple[ir.Value, int]] | None:
    """Return the constant of an Add, and the node of its other input."""
    bias = [factor for factor in node.inputs if _is_constant(factor)]
    rest = [factor for factor in node.inputs if not _is_constant(factor)]
    if len(bias) != 1 or len(rest) != 1 or len(rest[0].uses()) != 1:
        return None
    own, made = _constants(bias), below(rest[0])
    return [*own, *made] if own and made else None


def _linear_weights(value: ir.Value) -> list[tuple[ir.Value, int]] | None:
    """Return the weight, and the bias if there is one, whose rows compute a value's channels."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Add":
        return _with_bias(node, _linear_weights) or _both(node)
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    weight = node.inputs[1]
    axis = 0 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) else 1
    if (maker := weight.producer()) is not None and maker.op_type == "Transpose" and len(weight.uses()) == 1:
        weight, axis = maker.inputs[0], 1 - axis
    if not _is_constant(weight) or len(weight.uses()) != 1 or len(weight.const_value.shape) != 2:
        return None
    biases = _constants(list(node.inputs[2:3])) if len(node.inputs) > 2 and node.inputs[2] is not None else []
    return None if biases is None else [(weight, axis), *biases]


def _both(node: ir.Node) -> list[tuple[ir.Value, int]] | None:
    """Return the linears of a sum of two."""
    made = [_linear_weights(factor) if len(factor.uses()) == 1 else None for factor in node.inputs]
    return None if None in made else [place for places in made for place in places or ()]


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def _constants(values: Sequence[ir.Value]) -> list[tuple[ir.Value, int]] | None:
    """Return initializers that are vectors with a single use, with their last axis."""
    if not values or not all(_is_constant(value) and len(value.uses()) == 1 for value in values):
        return None
    shapes = [value.const_value.shape.numpy() for value in values]
    if not all(shape and shape[-1] > 1 and np.prod(shape) == shape[-1] for shape in shapes):
        return None
    return [(value, len(shape) - 1) for value, shape in zip(values, shapes, strict=True)]
