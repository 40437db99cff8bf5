"""A small decoder with every shape of weight, and how graphs of any format are run and compared."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from edgemix.export.quantization import quantize

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.formats import Format, Target


VOCABULARY, HIDDEN, INNER = 70, 48, 40
"""Neither width is a multiple of any format's block."""


CAP = 5.0


IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 69, 0]])


@cache
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCABULARY, HIDDEN),
        "positions": (16, HIDDEN),
        "up": (HIDDEN, INNER),
        "down": (HIDDEN, INNER),
        "bias": (HIDDEN,),
        "head": (HIDDEN, VOCABULARY),
    }
    return {name: (rng.standard_normal(shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}


def write_decoder(folder: Path, *, tied: bool) -> Path:
    """A decoder without attention that has every shape of weight: lookups by token and by position, a stored transpose
    (MatMul), a Gemm with transB and bias behind a Reshape, a tied (through Transpose) or own head under a tanh cap."""
    used = {name: array for name, array in weights().items() if not (tied and name == "head")}
    constants = {"flat": np.array([-1, INNER]), "cap": np.float32(CAP)}
    node = partial(helper.make_node, doc_string=f"made in {folder}")
    nodes = [
        node("Gather", ["embed", "input_ids"], ["tokens"]),
        node("Gather", ["positions", "position_ids"], ["places"]),
        node("Add", ["tokens", "places"], ["x"]),
        node("MatMul", ["x", "up"], ["h"]),
        node("Sigmoid", ["h"], ["gate"]),
        node("Mul", ["h", "gate"], ["a"]),
        node("Reshape", ["a", "flat"], ["rows"]),
        node("Gemm", ["rows", "down", "bias"], ["d"], transB=1),
        node("Shape", ["x"], ["shape"]),
        node("Reshape", ["d", "shape"], ["y"]),
        *([node("Transpose", ["embed"], ["head"], perm=[1, 0])] if tied else []),
        node("MatMul", ["y", "head"], ["raw"]),
        node("Div", ["raw", "cap"], ["scaled"]),
        node("Tanh", ["scaled"], ["capped"]),
        node("Mul", ["capped", "cap"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "position_ids")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", VOCABULARY])]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in {**used, **constants}.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def run(path: Path, ids: np.ndarray = IDS, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Every output on the CPU provider, for new tokens after a past in a growing cache (none by default)."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    length = next(iter(past.values())).shape[2] if past else 0
    total = length + ids.shape[1]
    feed = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            feed[value.name] = ids
        elif value.name == "attention_mask":
            feed[value.name] = np.ones((len(ids), total), np.int64)
        elif value.name == "position_ids":
            feed[value.name] = np.tile(np.arange(length, total), (len(ids), 1))
        elif past:
            feed[value.name] = past[value.name.replace("past_key_values", "present")]
        else:
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            feed[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), kind)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feed), strict=True))


def shrink(source: Path, output: Path, weight_format: Format, target: Target = "cpu") -> None:
    """`quantize`, with text for the format that looks at activations."""
    text = (
        np.random.default_rng(2).integers(3, VOCABULARY, (4, 16)).tolist() if weight_format == "int8-dynamic" else None
    )
    quantize(source, output, weight_format, target=target, calibration=text)


def without_int8_products(path: Path) -> Path:
    """A copy whose MatMulNBits computes in float, so that only the weights are quantized."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, path.with_name("float.onnx"))
    return path.with_name("float.onnx")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits.astype(np.float64)).log_softmax(-1).numpy()
