"""Smoothing and 8-bit activations: what can be folded, that folding changes nothing, that it makes products exact."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemix.export.graphs.weights import linears
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.quantization.graph import dynamic
from edgemix.export.quantization.graph.dynamic import quantize_dynamic
from edgemix.export.quantization.graph.emission import block_emitter
from edgemix.export.quantization.statistics.activations import observe
from edgemix.export.quantization.transforms import smoothing
from edgemix.export.quantization.transforms.smoothing import (
    divide,
    folds,
    multiply,
    quantize_rows,
    search,
    separate_outliers,
)
from edgemix.progress import NO_PROGRESS

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INNER, VOCABULARY = 32, 48, 40
IDS = np.arange(24)[None] % VOCABULARY


def write_block(folder: Path, *, spread: float = 1.0, spike: float = 1.0) -> Path:
    """Embedding, a normalization with gain, a gated feed-forward network, a head; every third channel of the gain is
    `spread` times the others, which the weights that read it make up for; token 5's products are multiplied by `spike`.
    """
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCABULARY, HIDDEN), "gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    arrays["head"] = rng.standard_normal((HIDDEN, VOCABULARY)).astype(np.float32)
    arrays["gain"] = np.where(np.arange(HIDDEN) % 3, 1, spread).astype(np.float32)
    for name in ("gate", "up"):
        arrays[name][::3] /= spread
    arrays["boost"] = np.ones((VOCABULARY, 1), np.float32)
    arrays["boost"][5] = spike
    node = helper.make_node
    nodes = [
        node("Gather", ["embed", "input_ids"], ["x"]),
        node("RMSNormalization", ["x", "gain"], ["n"], epsilon=1e-6, axis=-1),
        node("MatMul", ["n", "gate"], ["g"]),
        node("Sigmoid", ["g"], ["s"]),
        node("MatMul", ["n", "up"], ["u"]),
        node("Gather", ["boost", "input_ids"], ["b"]),
        node("Mul", ["s", "b"], ["sb"]),
        node("Mul", ["sb", "u"], ["p"]),
        node("MatMul", ["p", "down"], ["d"]),
        node("Add", ["x", "d"], ["y"]),
        node("MatMul", ["y", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", VOCABULARY])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def logits(model: ir.Model, path: Path) -> np.ndarray:
    model.opset_imports.setdefault("com.microsoft", 1)
    ir.save(model, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input_ids": IDS})[0]


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {output.name: output for node in model.graph for output in node.outputs}


@pytest.mark.parametrize(("name", "readers", "expected"), [("n", 2, ["gain"]), ("p", 1, ["up"]), ("y", 1, None)])
def test_what_can_be_folded(name: str, readers: int, expected: list[str] | None, tmp_path: Path) -> None:
    found = folds(values(ir.load(write_block(tmp_path)))[name], readers)
    assert (found and [place.name for place, _ in found]) == expected


def test_nothing_is_folded_under_the_eyes_of_another_reader(tmp_path: Path) -> None:
    assert folds(values(ir.load(write_block(tmp_path)))["n"], 1) is None


def test_folding_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    path = write_block(tmp_path, spread=30)
    model = ir.load(path)
    before = logits(ir.load(path), tmp_path / "before.onnx")
    rng = np.random.default_rng(1)
    for name, width in (("n", HIDDEN), ("p", INNER)):
        value, scale = values(model)[name], np.exp(rng.standard_normal(width)).astype(np.float32)
        readers = [linear for linear in linears(model.graph) if linear.node.inputs[0] is value]
        divide(folds(value, len(readers)) or [], scale)
        for linear in readers:
            multiply(linear, scale)
    after = logits(model, tmp_path / "after.onnx")
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_rows_are_rounded_to_their_own_scale() -> None:
    rows = np.array([[1.0, -0.5, 0.0], [1000.0, -3.0, 2.0], [0.0, 0.0, 0.0]], np.float32)
    rounded = quantize_rows(rows)
    np.testing.assert_allclose(rounded[0], rows[0], atol=0.5 / 127)
    np.testing.assert_allclose(rounded[1], [1000, 0, 0], atol=1e-3)
    np.testing.assert_array_equal(rounded[2], 0)


def test_the_search_spreads_a_channel_that_stands_out() -> None:
    rng = np.random.default_rng(0)
    activation = rng.standard_normal((200, HIDDEN)).astype(np.float32)
    activation[:, 3] *= 100
    weight = rng.standard_normal((INNER, HIDDEN)).astype(np.float32)
    measure = partial(search, activation, np.abs(activation).max(axis=0), [weight])
    plain, smoothed = measure(foldable=False), measure(foldable=True)
    assert plain.scale is None
    assert smoothed.scale is not None
    assert smoothed.scale.argmax() == 3
    assert smoothed.error < plain.error / 2


def test_activations_are_observed_as_they_are(tmp_path: Path) -> None:
    path = write_block(tmp_path)
    model = ir.load(path)
    embed = model.graph.initializers["embed"].const_value.numpy()
    windows = [[3, 1, 4], [1, 5]]
    seen = list(observe(model, tmp_path, [values(model)["x"]], windows))
    for found, window in zip(seen, windows, strict=True):
        np.testing.assert_array_equal(found[values(model)["x"]], embed[window])
    assert [output.name for output in model.graph.outputs] == ["logits"]
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def quantized(folder: Path, path: Path) -> tuple[np.ndarray, list[str]]:
    model = ir.load(path)
    outliers = block_emitter(partial(rtn, bits=8, block=16, symmetric=True))
    quantize_dynamic(model, folder, IDS.tolist(), outliers=outliers, progress=NO_PROGRESS)
    operators = [node.op_type for node in model.graph]
    return logits(model, folder / "quantized.onnx"), operators


def test_channels_that_stand_out_cost_less_when_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_block(tmp_path, spread=50)
    exact = logits(ir.load(path), tmp_path / "exact.onnx")
    found, operators = quantized(tmp_path, path)
    assert operators.count("MatMulIntegerToFloat") == 3
    assert operators.count("QuantizeLinear") == 3  # once for gate and up
    monkeypatch.setattr(smoothing, "ALPHAS", ())
    unsmoothed, _ = quantized(tmp_path, path)
    assert np.abs(found - exact).mean() < 0.7 * np.abs(unsmoothed - exact).mean()


def test_a_token_of_zeros_stays_one(tmp_path: Path) -> None:
    path = write_block(tmp_path, spike=0.0)
    model = ir.load(path)
    model.graph.initializers["embed"].const_value = ir.tensor(np.zeros((VOCABULARY, HIDDEN), np.float32))
    ir.save(model, tmp_path / "zeros.onnx")
    found, operators = quantized(tmp_path, tmp_path / "zeros.onnx")
    assert "MatMulIntegerToFloat" in operators
    np.testing.assert_array_equal(found, 0)


def test_a_huge_token_keeps_float_activations(tmp_path: Path) -> None:
    path = write_block(tmp_path, spike=1e4)
    _, operators = quantized(tmp_path, path)
    assert operators.count("MatMulNBits") >= 1


def test_a_huge_channel_of_one_token_is_set_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All linears keep 8-bit products, and the token's other channels come through."""
    path = write_block(tmp_path)
    model = ir.load(path)
    boost = np.ones((VOCABULARY, INNER), np.float32)
    boost[5, 7] = 1e4
    down = model.graph.initializers["down"].const_value.numpy().copy()
    down[7] /= 1e4
    model.graph.initializers["boost"].const_value = ir.tensor(boost)
    model.graph.initializers["down"].const_value = ir.tensor(down)
    ir.save(model, path)
    exact = logits(ir.load(path), tmp_path / "exact.onnx")
    monkeypatch.setattr(smoothing, "ALPHAS", ())
    found, operators = quantized(tmp_path, path)
    assert operators.count("MatMulIntegerToFloat") == 3
    assert operators.count("MatMulNBits") == 0
    monkeypatch.setattr(smoothing, "OUTLIER_COUNTS", ())
    monkeypatch.setattr(dynamic, "MAX_TOKEN_ERROR", np.inf)
    whole, _ = quantized(tmp_path, path)
    lost, before = (np.abs(each - exact)[IDS == 5].mean() for each in (found, whole))
    assert lost < 0.3 * before


def test_as_few_channels_are_set_apart_as_it_takes() -> None:
    rng = np.random.default_rng(0)
    activation = rng.standard_normal((200, 96)).astype(np.float32)
    activation[:3, [5, 40, 41]] *= 1e3
    weight = rng.standard_normal((INNER, 96)).astype(np.float32)
    found = search(activation, np.abs(activation).max(axis=0), [weight], foldable=False)
    better = separate_outliers(activation, [weight], found, 0.1)
    assert {5, 40, 41} < set(better.outliers)
    assert len(better.outliers) == 4
    assert better.spike <= 0.1 < found.spike
    activation[:3] *= 1e3
    found = search(activation, np.abs(activation).max(axis=0), [weight], foldable=False)
    assert separate_outliers(activation, [weight], found, 0.1) is found
