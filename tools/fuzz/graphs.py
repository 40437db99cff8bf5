"""Mutations of ONNX graphs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper
from values import integer, mutated_bytes

from edgemix.bundle.graph_safety import OPERATORS

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

_OPERATORS = (
    "Loop",
    "If",
    "Scan",
    "SequenceMap",
    "RandomNormal",
    "RandomUniformLike",
    "ConstantOfShape",
    "Expand",
    "Range",
    "Tile",
    "Resize",
    "Pad",
    "OneHot",
    "Add",
    "MatMul",
    "Gather",
    "GatherND",
    "ScatterND",
    "Concat",
    "Reshape",
    "Slice",
    "Cast",
    "Identity",
    "CumSum",
    "TopK",
    "NonZero",
    "Einsum",
    "EyeLike",
    "Trilu",
    "MatMulNBits",
    "GroupQueryAttention",
    "QuantizeLinear",
    "DequantizeLinear",
    "Optional",
    "StringNormalizer",
    "Nothing",
)
_ATTRIBUTES = (
    *(
        "axis",
        "axes",
        "to",
        "perm",
        "keepdims",
        "batch_dims",
        "K",
        "N",
        "bits",
        "block_size",
        "num_heads",
        "kv_num_heads",
    ),
    *(
        "start",
        "end",
        "k",
        "largest",
        "upper",
        "exclusive",
        "reverse",
        "transA",
        "transB",
        "epsilon",
        "alpha",
        "interleaved",
    ),
    *("gather_axis", "quantize_axis", "quant_type", "num_outputs", "allowzero", "stash_type", "is_causal", "scale"),
)
_NAMES = (b"\xff\xfe\xfd", b"", b"logits", b"a" * 5_000, b"\0", b"\x1b[2J", b"../x", b"input_ids")


def graph(rng: Random, data: bytes) -> bytes:
    """Return a graph with hostile parts, or with damaged bytes."""
    action = rng.randrange(6)
    if action == 0:
        return mutated_bytes(rng, data)
    if action == 1:  # a name that is no UTF-8 cannot be set by protobuf
        name = rng.choice(
            (b"present.0.key", b"logits", b"bigram", b"input_ids", b"shares", b"batch", b"Gather", b"table")
        )
        return data.replace(name, rng.choice((rng.choice(_NAMES), b"\xff" * len(name))))
    model = onnx.ModelProto()
    model.ParseFromString(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _MUTATIONS[rng.randrange(len(_MUTATIONS))](rng, model)
    data = model.SerializeToString()
    return mutated_bytes(rng, data) if action == 2 else data


def _node(rng: Random, model: onnx.ModelProto) -> onnx.NodeProto:
    return rng.choice(model.graph.node)


def _small(value: int) -> int:
    """Return a number that protobuf's int64 holds."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _change_operator(rng: Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    node.op_type, node.domain = rng.choice(_OPERATORS), rng.choice(("", "", "com.microsoft", "ai.onnx.ml", "evil"))


def _change_attribute(rng: Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    numbers = [attribute for attribute in node.attribute if attribute.type == onnx.AttributeProto.INT]
    if numbers:
        rng.choice(numbers).i = _small(integer(rng))
    else:
        name = rng.choice(
            (
                "axis",
                "axes",
                "to",
                "perm",
                "value",
                "body",
                "num_heads",
                "K",
                "N",
                "block_size",
                "keepdims",
                "allowzero",
            )
        )
        node.attribute.append(helper.make_attribute(name, rng.choice((_small(integer(rng)), 0.5, "a", [1, -1]))))


def _change_edges(rng: Random, model: onnx.ModelProto) -> None:
    node, other = _node(rng, model), _node(rng, model)
    names = [*other.output, *other.input, "", "absent"]
    if node.input and rng.random() < 0.7:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(names)


def _change_tensor(rng: Random, model: onnx.ModelProto) -> None:
    tensor = rng.choice(model.graph.initializer)
    action = rng.randrange(5)
    if action == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = _small(integer(rng))
    elif action == 1:
        tensor.dims.append(_small(integer(rng)))
    elif action == 2:
        tensor.data_type = rng.choice((*range(24), 99, -1))
    elif action == 3 and tensor.data_type == onnx.TensorProto.INT64 and len(tensor.raw_data) == 8:
        tensor.raw_data = np.int64(_small(integer(rng))).tobytes()
    else:
        tensor.raw_data = mutated_bytes(rng, tensor.raw_data[:64]) + tensor.raw_data[64:]


def _change_shape(rng: Random, model: onnx.ModelProto) -> None:
    values = [*model.graph.input, *model.graph.output]
    dims = rng.choice(values).type.tensor_type.shape.dim
    if dims:
        rng.choice(dims).dim_value = _small(integer(rng))


def _allocate(rng: Random, model: onnx.ModelProto) -> None:
    """Add a large tensor to the logits."""
    size = _small(rng.choice((1 << 20, 1 << 26, 1 << 28, 1 << 31, 1 << 40, 1 << 62, integer(rng))))
    one, sizes = np.array([1], np.int64), np.array([size], np.int64)
    constants = {
        "fuzz_sizes": sizes,
        "fuzz_one": one,
        "fuzz_zero": np.int64(0),
        "fuzz_size": np.int64(size),
        "fuzz_step": np.int64(1),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for node in model.graph.node:
        node.output[:] = ["fuzz_logits" if name == "logits" else name for name in node.output]
    make = helper.make_node
    large = rng.choice(
        (
            [make("ConstantOfShape", ["fuzz_sizes"], ["fuzz_large"])],
            [make("Expand", ["fuzz_one", "fuzz_sizes"], ["fuzz_large"])],
            [make("Tile", ["fuzz_one", "fuzz_sizes"], ["fuzz_large"])],
            [make("Range", ["fuzz_zero", "fuzz_size", "fuzz_step"], ["fuzz_large"])],
            [
                make("Mul", ["fuzz_sizes", "fuzz_one"], ["fuzz_computed"]),
                make("ConstantOfShape", ["fuzz_computed"], ["fuzz_large"]),
            ],
            [
                make("Constant", [], ["fuzz_made"], value=numpy_helper.from_array(sizes)),
                make("Expand", ["fuzz_one", "fuzz_made"], ["fuzz_large"]),
            ],
        )
    )
    model.graph.node.extend(
        [
            *large,
            make("ReduceSum", ["fuzz_large"], ["fuzz_sum"], keepdims=0),
            make("Cast", ["fuzz_sum"], ["fuzz_float"], to=1),
            make("Add", ["fuzz_logits", "fuzz_float"], ["logits"]),
        ]
    )


def _loop(rng: Random, model: onnx.ModelProto) -> None:
    """Hide the graph in a subgraph, or call a function."""
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node(rng.choice(("Loop", "If", "Scan")), ["", ""], ["fuzz_looped"], body=body))
    if rng.random() < 0.3:
        model.functions.append(helper.make_function("evil", "f", ["x"], ["x"], [], [helper.make_opsetid("", 21)]))


def _values(rng: Random, model: onnx.ModelProto) -> None:
    """Put numbers that are no finite ones, or token ids beyond the vocabulary, into constants."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and rng.random() < 0.5:
            # As many as there are: an earlier mutation may have changed the shape.
            value = np.float32(rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e-45)))
            tensor.raw_data = value.tobytes() * (len(tensor.raw_data) // 4)


def _many(rng: Random, model: onnx.ModelProto) -> None:
    count = rng.choice((100, 5_000))
    model.graph.node.extend(helper.make_node("Identity", ["table"], [f"fuzz_{number}"]) for number in range(count))


def _operate(rng: Random, model: onnx.ModelProto) -> None:
    """Compute an operator of those that are allowed, of constants that may not be its kind, as one more output."""
    domain = rng.choice(("", "", "", "com.microsoft"))
    operator = rng.choice(sorted(OPERATORS[domain]))
    names = [f"fuzz_in_{number}" for number in range(rng.choice((1, 1, 2, 2, 3, 5)))]
    for name in names:
        model.graph.initializer.append(numpy_helper.from_array(_array(rng), name))
    inputs = [name if rng.random() < 0.9 else "" for name in names]
    keys = rng.sample(_ATTRIBUTES, rng.choice((0, 0, 1, 2, 4)))
    values = {key: rng.choice((0, 1, 2, -1, -7, 16, 1 << 20, [0, 1], [-1], 0.5, 1e30)) for key in keys}
    model.graph.node.append(helper.make_node(operator, inputs, ["fuzz_out"], domain=domain, **values))
    model.graph.output.append(helper.make_empty_tensor_value_info("fuzz_out"))


def _array(rng: Random) -> np.ndarray:
    shape = [rng.choice((0, 1, 1, 2, 3, 4, 8, 16)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
    dtype = rng.choice((np.float32, np.float32, np.float16, np.int64, np.int64, np.int32, np.int8, np.uint8, np.bool_))
    values = [rng.choice((0, 1, 1, 2, 3, -1, 100, -100)) for _ in range(math.prod(shape))]
    return np.array(values).astype(dtype).reshape(shape)


_MUTATIONS: tuple[Callable[[Random, onnx.ModelProto], None], ...] = (
    _change_operator,
    _change_attribute,
    _change_edges,
    _change_tensor,
    _change_shape,
    _allocate,
    _loop,
    _values,
    _many,
    _operate,
    _operate,
)
