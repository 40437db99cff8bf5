"""W8A8: int8 weights with one scale a row, activations quantized at run time with one scale a token.

A scale for each token makes a token's result independent of what else is in the call (a draft is verified exactly as it
would be decoded), and one huge token costs the others nothing. ONNX Runtime's integer products take one scale for the
whole activation, so the token's own scale is divided out before and multiplied in after:

    m = max_k |x_k|,   q = round(127 x / m) + 128 (uint8),   y = m (q - 128) W / 127

QuantizeLinear rounds with the tokens' steps, as blocks as wide as the activation (opset 21), prompts 4% faster than
a division before it.

Where a few channels of a few tokens are so large that rounding would lose all others (those of attention sinks), these
outlier channels are multiplied in floating point:  y = m (q' - 128) W' / 127 + x_c W_c.

The head is such a product, too, and one channel of `CHANNELS_PER_OUTLIER` of its input, the largest ones, are always
outlier channels. If the model ties them, the embedding reads rows of the head's codes.

Measured on one core (AVX512-VNNI), a [576, 1536] product of 1 / 16 / 512 tokens takes 41 / 94 / 1,470 microseconds;
DynamicQuantizeMatMul, with one scale for all tokens, 40 / 94 / 1,610; MatMulNBits with 8-bit blocks of 32: 55 / 186 /
3,980; with 4-bit blocks 31 / 171 / 4,700. A head of 49,152 tokens (two cores, Sapphire Rapids) takes 1.2 / 1.7 ms for
1 / 16 tokens; as MatMulNBits with 8-bit blocks of 32, 1.4 / 6.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from edgemix.export.graphs.rewrites import CONTRIB, add_half, add_initializer, replace, replace_linear, replace_linears
from edgemix.export.graphs.weights import by_activation, head, linears, lookups
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.quantization.statistics.activations import observe
from edgemix.export.quantization.transforms.smoothing import (
    Smoothing,
    divide,
    folds,
    multiply,
    search,
    separate_outliers,
    without,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.export.graphs.weights import Linear, Matrix
    from edgemix.export.quantization.graph.emission import Emitter
    from edgemix.progress import Progress

MAX_TOKEN_ERROR = 0.1
"""Largest error of a token's product, in units of a typical token's product, beyond which outlier channels are
separated, and where that does not suffice, linears keep float activations. Of SmolLM2-135M's 120 activations eight
exceed it, all feed-forward products, and 1 to 32 of 1,536 channels are enough. Without either, its perplexity rises by
1.1%; with those linears in 8-bit weights, or with outlier channels, by 0.9%."""

CHANNELS_PER_OUTLIER = 32
"""The head's input has one outlier channel for this many channels. SmolLM2-135M's head then differs from the exact one
by 0.0007 nats (KL) on prose and 0.0006 on code; with 8-bit blocks and their own scales of activations by 0.0008 and
0.0011, and without outlier channels by 0.007 and 0.014."""
_SEARCHED_ROWS = 512


class _Activation(NamedTuple):
    """An activation [..., K], given by the linears that read it."""

    readers: list[Linear]

    @property
    def value(self) -> ir.Value:
        """The activation's value, which changes when the linear that computes it is replaced."""
        return self.readers[0].node.inputs[0]


def quantize_dynamic(
    model: ir.Model,
    folder: Path,
    windows: Sequence[Sequence[int]],
    *,
    outliers: Emitter,
    low_rank: Collection[str] = (),
    progress: Progress,
) -> None:
    """Replace a decoder graph's linears by 8-bit products.

    Activations are smoothed first if scales can be folded, and remaining outlier channels are separated (see
    `smoothing`); the linears of an activation that loses more than `MAX_TOKEN_ERROR` go to the emitter `outliers`.

    Args:
        model: The fp32 graph; embeddings that the head does not share are quantized already. Changed in place.
        folder: The folder of its external data.
        windows: Token ids of calibration text.
        outliers: Emitter for linears with too large an error.
        low_rank: Names of weights that stay as they are.
        progress: Progress callback.
    """
    graph = model.graph
    last, all_linears = head(graph), [*linears(graph)]
    those = by_activation(linear for linear in all_linears if linear.weight.name not in low_rank)
    activations = [_Activation(readers) for readers in those]
    found = _smoothings(model, folder, activations, windows, last=last, progress=progress)
    for activation, smoothing in zip(activations, found, strict=True):
        if smoothing.scale is not None:
            divide(folds(activation.value, len(activation.readers)) or (), smoothing.scale)
    rows, few = _Rows(graph), []
    for activation, smoothing in zip(activations, found, strict=True):
        if last is not None and activation.readers[0].node is last.node:
            rows.emit_head(activation, smoothing.outliers)
            continue
        for linear in activation.readers:
            if smoothing.scale is not None:
                multiply(linear, smoothing.scale)
        if smoothing.spike <= MAX_TOKEN_ERROR:
            rows.emit(activation, smoothing.outliers)
        else:
            few.append(activation.readers)
    for readers in few:
        outliers(graph, readers)


def quantize_head(model: ir.Model, folder: Path, windows: Sequence[Sequence[int]], *, progress: Progress) -> None:
    """Replace the head alone by such a product; a tied embedding reads its codes.

    Args:
        model: The fp32 graph, with a head that `weights.head` finds; changed in place.
        folder, windows, progress: As `quantize_dynamic`.
    """
    last = head(model.graph)
    if last is None:
        return
    activation = _Activation([last])
    (found,) = _smoothings(model, folder, [activation], windows, last=last, progress=progress)
    _Rows(model.graph).emit_head(activation, found.outliers)


class _Rows:
    """Emit linears: one product for all that read an activation."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        constants: dict[str, np.ndarray] = {
            "last": np.array([-1], np.int64),
            "top": np.array(127, np.float32),
            "one": np.array(1, np.float32),
            "middle": np.array(128, np.uint8),
        }
        self._constants = {name: add_initializer(graph, f"rows.{name}", array) for name, array in constants.items()}
        self._middles: dict[tuple[object, ...], ir.Value] = {}

    def emit(self, activation: _Activation, outliers: tuple[int, ...] = ()) -> None:
        """Replace the linears of an activation; the channels `outliers` stay in floating point."""
        name = activation.readers[0].weight.name
        matrix = np.concatenate([linear.matrix() for linear in activation.readers])
        signed, steps = _signed(without(matrix, outliers))
        codes = add_initializer(self._graph, f"{name}.codes", signed)
        scales = add_half(self._graph, f"{name}.scales", steps)
        nodes = self._product_beside(activation.value, matrix, codes, scales, outliers)
        replace_linears(self._graph, activation.readers, nodes)

    def emit_head(self, activation: _Activation, outliers: tuple[int, ...]) -> None:
        """Replace the head, and the lookups in the same matrix."""
        (linear,) = activation.readers
        name, matrix = linear.weight.name, linear.matrix()
        signed, steps = _signed(matrix)
        codes = add_initializer(self._graph, f"{name}.codes", signed)
        scales = add_half(self._graph, f"{name}.scales", steps)
        for lookup in [node for node in lookups(self._graph) if node.inputs[0] is linear.weight]:
            self._look_up(lookup, codes, scales)
        replace_linear(self._graph, linear, self._product_beside(activation.value, matrix, codes, scales, outliers))

    def _look_up(self, node: ir.Node, codes: ir.Value, scales: ir.Value) -> None:
        """Replace a Gather of rows for ids [batch, sequence] by one of columns of the codes [K, tokens]."""
        ids = node.inputs[1]
        columns = ir.node("Gather", [codes, ids], {"axis": 1})
        rows = ir.node("Transpose", [columns.outputs[0]], {"perm": [1, 2, 0]})
        numbers = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
        steps = ir.node("Gather", [scales, ids], {"axis": 0})
        wide = ir.node("Unsqueeze", [steps.outputs[0], self._constants["last"]])
        product = ir.node("Mul", [numbers.outputs[0], wide.outputs[0]])
        replace(self._graph, node, [columns, rows, numbers, steps, wide, product])

    def _product_beside(
        self, value: ir.Value, matrix: Matrix, codes: ir.Value, scales: ir.Value, outliers: tuple[int, ...]
    ) -> list[ir.Node]:
        """Return the nodes of a product with codes, and of that of the channels `outliers` in floating point."""
        if not outliers:
            return self._product(value, codes, scales)
        indices = add_initializer(self._graph, f"{value.name}.apart", np.array(outliers, np.int64))
        rest = np.ones(matrix.shape[1], np.float32)
        rest[list(outliers)] = 0
        taken = ir.node("Gather", [value, indices], {"axis": -1})
        others = ir.node("Mul", [value, add_initializer(self._graph, f"{value.name}.rest", rest)])
        others.outputs[0].shape = value.shape
        # In fp32: what these few inputs are multiplied with must not be rounded.
        kept = add_initializer(self._graph, f"{codes.name}.apart", matrix[:, outliers].T)
        nodes = [taken, others, *self._product(others.outputs[0], codes, scales)]
        beside = ir.node("MatMul", [taken.outputs[0], kept])
        return [*nodes, beside, ir.node("Add", [nodes[-1].outputs[0], beside.outputs[0]])]

    def _product(self, value: ir.Value, codes: ir.Value, scales: ir.Value) -> list[ir.Node]:
        """Return the nodes that round an activation and multiply it."""
        one, middle = self._constants["one"], self._constants["middle"]
        size = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", [size.outputs[0], self._constants["last"]], {"keepdims": 1})
        # A token of zeros has no step, but whatever it is rounded to is multiplied by that, zero.
        step = ir.node("Div", [largest.outputs[0], self._constants["top"]])
        nodes, middles = self._middles_of(value, step.outputs[0])
        whole = {"axis": -1, "block_size": int(codes.const_value.shape[0])}
        rounded = ir.node("QuantizeLinear", [value, step.outputs[0], middles], whole)
        product = ir.node("MatMulIntegerToFloat", [rounded.outputs[0], codes, one, scales, middle], domain=CONTRIB)
        scaled = ir.node("Mul", [product.outputs[0], step.outputs[0]])
        return [size, largest, step, *nodes, rounded, product, scaled]

    def _middles_of(self, value: ir.Value, steps: ir.Value) -> tuple[list[ir.Node], ir.Value]:
        """The nodes that make a zero point for each of an activation's steps, and their output: none where they are
        there for another activation of as many tokens.
        """
        tokens = None if value.shape is None else tuple(value.shape)[:-1]
        if tokens in self._middles:
            return [], self._middles[tokens]
        shape = ir.node("Shape", [steps])
        middles = ir.node("Expand", [self._constants["middle"], shape.outputs[0]])
        if tokens is not None and all(isinstance(axis, int) or axis.value is not None for axis in tokens):
            self._middles[tokens] = middles.outputs[0]
        return [shape, middles], middles.outputs[0]


def _signed(matrix: Matrix) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """A matrix [N, K] as codes int8 [K, N] and a step for each of its rows.

    Signed weights: uint8 activations times int8 weights is the fast product on ARM and on x86 with VNNI. On x86 without
    VNNI it adds pairs up in 16 bits and may saturate, which costs some precision there.
    """
    blocks = rtn(matrix, bits=8, block=matrix.shape[1], symmetric=True)
    return (blocks.codes[:, 0].T ^ np.uint8(128)).view(np.int8), blocks.scales[:, 0]


def _smoothings(
    model: ir.Model,
    folder: Path,
    activations: Sequence[_Activation],
    windows: Sequence[Sequence[int]],
    *,
    last: Linear | None,
    progress: Progress,
) -> list[Smoothing]:
    """The scale of each activation: maxima from all windows, the choice among scales on rows of all of them. Of what
    the last linear reads, the widest channels.
    """
    values = [activation.value for activation in activations]
    maxima: list[Matrix] = [np.zeros(0, np.float32)] * len(values)
    kept: list[list[Matrix]] = [[] for _ in values]
    share = max(1, _SEARCHED_ROWS // len(windows))
    with progress.stage("activations", total=len(windows) + len(values)) as task:
        for seen in observe(model, folder, values, windows):
            for index, value in enumerate(values):
                largest = np.abs(seen[value]).max(axis=0)
                maxima[index] = np.maximum(maxima[index], largest) if maxima[index].size else largest
                # The first token of a text is like no other; the rest is taken evenly.
                kept[index].append(seen[value][:: max(1, len(seen[value]) // share)].copy())
            task.advance(1)
        smoothings = []
        for activation, largest, rows in zip(activations, maxima, kept, strict=True):
            if last is not None and activation.readers[0].node is last.node:
                wide = np.argsort(-largest, kind="stable")[: len(largest) // CHANNELS_PER_OUTLIER]
                smoothings.append(Smoothing(None, 0.0, 0.0, tuple(sorted(wide.tolist()))))
                continue
            weights = [linear.matrix() for linear in activation.readers]
            foldable = folds(activation.value, len(activation.readers)) is not None
            sample = np.concatenate(rows)
            found = search(sample, largest, weights, foldable=foldable)
            smoothings.append(
                found if found.spike <= MAX_TOKEN_ERROR else separate_outliers(sample, weights, found, MAX_TOKEN_ERROR)
            )
            task.advance(1)
    return smoothings
