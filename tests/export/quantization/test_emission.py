"""Linears that read one activation are one product of a quantized graph, as long as their blocks are alike."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from edgemix.export.quantization import quantize
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.rtn import rtn

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.formats import Format

VOCABULARY, HIDDEN, INNER = 70, 64, 96
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 69, 0]])
RNG = np.random.default_rng(0)
WEIGHTS = {
    name: (RNG.standard_normal(shape) * 0.3).astype(np.float32)
    for name, shape in {
        "embed": (VOCABULARY, HIDDEN),
        "gate": (HIDDEN, INNER),
        "up": (HIDDEN, INNER),
        "bias": (INNER,),
        "down": (INNER, HIDDEN),
        "head": (HIDDEN, VOCABULARY),
    }.items()
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Logits = (sigmoid(x gate + bias) * (x up)) down head, x = embed[ids]."""
    node = helper.make_node
    nodes = [
        node("Gather", ["embed", "input_ids"], ["x"]),
        node("MatMul", ["x", "gate"], ["g"]),
        node("Add", ["g", "bias"], ["shifted"]),
        node("Sigmoid", ["shifted"], ["share"]),
        node("MatMul", ["x", "up"], ["u"]),
        node("Mul", ["share", "u"], ["a"]),
        node("MatMul", ["a", "down"], ["y"]),
        node("MatMul", ["y", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "gated",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", VOCABULARY])],
        [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()],
    )
    path = tmp_path / "source.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def logits(weights: dict[str, np.ndarray]) -> np.ndarray:
    x = weights["embed"][IDS]
    gate = 1 / (1 + np.exp(-(x @ weights["gate"] + weights["bias"])))
    return gate * (x @ weights["up"]) @ weights["down"] @ weights["head"]


def run(path: Path) -> np.ndarray:
    (found,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input_ids": IDS})
    return found


def widths(path: Path) -> list[int]:
    """Output widths of the quantized layers' products, in their order."""
    return [
        node.attributes.get_int("N")
        for node in ir.load(path).graph
        if node.op_type == "MatMulNBits" and node.attributes.get_int("N") != VOCABULARY
    ]


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_gate_and_up_are_one_product(weight_format: Format, source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out.onnx", weight_format, target="cpu")
    assert widths(tmp_path / "out.onnx") == [2 * INNER, HIDDEN]
    eight = partial(rtn, bits=8, block=32, symmetric=True)
    inner = eight if weight_format == "int8" else partial(rtn, bits=4, block=32, symmetric=False)
    found = {
        name: (eight if name in ("embed", "head") else inner)(np.ascontiguousarray(turned)).dequantized()
        for name, turned in {
            name: weight if name == "embed" else weight.T for name, weight in WEIGHTS.items() if name != "bias"
        }.items()
    }
    stored = {name: weight if name == "embed" else weight.T for name, weight in found.items()}
    np.testing.assert_allclose(run(tmp_path / "out.onnx"), logits(WEIGHTS | stored), atol=0.5, rtol=0.1)


def test_a_narrow_and_a_wide_one_stay_apart(source: Path, tmp_path: Path) -> None:
    """In one product both would have 8 bits, and the file would be larger than its budget."""
    table = BlockTable()
    for name, bits in (("gate", 4), ("up", 8)):
        matrix = np.ascontiguousarray(WEIGHTS[name].T)
        table.add(matrix, rtn(matrix, bits=bits, block=32, symmetric=False))
    quantize(source, tmp_path / "out.onnx", "int4", target="cpu", table=table)
    assert widths(tmp_path / "out.onnx") == [INNER, INNER, HIDDEN]
    bits = [node.attributes.get_int("bits") for node in ir.load(tmp_path / "out.onnx").graph if "N" in node.attributes]
    assert bits[:2] == [4, 8]
    reference = logits(WEIGHTS)
    assert np.corrcoef(run(tmp_path / "out.onnx").ravel(), reference.ravel())[0, 1] > 0.98


def test_rows_of_zeros_have_products_of_zeros(source: Path, tmp_path: Path) -> None:
    """int8-dynamic divides by each token's largest activation, and a token may have none."""
    text = np.random.default_rng(2).integers(0, VOCABULARY, (4, 16)).tolist()
    quantize(source, tmp_path / "out.onnx", "int8-dynamic", target="cpu", calibration=text)
    model = ir.load(tmp_path / "out.onnx")
    assert [node.op_type for node in model.graph].count("MatMulIntegerToFloat") >= 1
    found = run(tmp_path / "out.onnx")
    assert np.corrcoef(found.ravel(), logits(WEIGHTS).ravel())[0, 1] > 0.99
    codes = next(value for name, value in model.graph.initializers.items() if name.startswith("embed"))
    silent = codes.const_value.numpy().copy()
    silent[3] = 128
    codes.const_value = ir.tensor(silent, name=codes.name)
    ir.save(model, tmp_path / "silent.onnx")
    changed = run(tmp_path / "silent.onnx")
    np.testing.assert_array_equal(changed[0, 0], np.zeros(VOCABULARY))
    np.testing.assert_array_equal(changed[:, 1:], found[:, 1:])
