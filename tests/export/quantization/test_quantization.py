"""Weight formats: on a hand-made graph against numpy with the dequantized weights, on tiny exported models loosely."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from bitsandbytes import functional
from helpers.quantized_graphs import (
    CAP,
    HIDDEN,
    IDS,
    VOCABULARY,
    log_softmax,
    run,
    shrink,
    weights,
    without_int8_products,
    write_decoder,
)
from helpers.tiny_models import tiny_model
from onnx import TensorProto, helper, numpy_helper

from edgemix.bundle.manifest import GraphParity
from edgemix.errors import InputError
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.quantization import EMITTERS, quantize
from edgemix.export.quantization.algorithms.hqq import hqq
from edgemix.export.quantization.algorithms.nf4 import nf4
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.quantization.graph.float16 import to_half
from edgemix.formats import TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.formats import Format, Target


def decode(arrays: dict[str, np.ndarray], *, tied: bool) -> np.ndarray:
    """The logits of `write_decoder`'s graph for IDS."""
    x = arrays["embed"][IDS] + arrays["positions"][: IDS.shape[1]]
    h = x @ arrays["up"]
    y = h / (1 + np.exp(-h)) @ arrays["down"].T + arrays["bias"]
    return np.tanh(y @ (arrays["embed"].T if tied else arrays["head"]) / CAP) * CAP


def nf4_dequantized(weight: np.ndarray) -> np.ndarray:
    """The values of a weight [N, K] in NF4, by the definition: bitsandbytes 0.50 reads its own codes wrongly on CPUs
    where blocks cross rows."""
    stored = nf4(weight)
    levels = functional.get_4bit_type("nf4", device="cpu").numpy()
    codes = np.stack([stored.codes >> 4, stored.codes & 15], axis=1).reshape(-1)[: weight.size]
    return (levels[codes] * np.repeat(stored.maxima, stored.block)[: weight.size]).reshape(weight.shape)


def int8(weight: np.ndarray) -> np.ndarray:
    return rtn(weight, bits=8, block=32, symmetric=True).dequantized()


DEQUANTIZED = {
    "fp32": lambda weight: weight,
    "int8": int8,
    "int4": lambda weight: rtn(weight, bits=4, block=32, symmetric=False).dequantized(),
    "nf4": nf4_dequantized,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weight_format", DEQUANTIZED)
def test_logits_are_those_of_the_dequantized_weights(weight_format: Format, tied: bool, tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source", tied=tied)
    shrink(source, tmp_path / "out" / "model.onnx", weight_format, "cpu")
    table = (lambda weight: weight) if weight_format == "fp32" else int8
    dequantize = DEQUANTIZED[weight_format]
    expected = decode(
        weights()
        | {
            "embed": table(weights()["embed"]),
            "up": dequantize(np.ascontiguousarray(weights()["up"].T)).T,
            "down": dequantize(weights()["down"]),
            "head": table(np.ascontiguousarray(weights()["head"].T)).T,
        },
        tied=tied,
    )
    logits = run(without_int8_products(tmp_path / "out" / "model.onnx"))["logits"]
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize(("weight_format", "atol"), [("fp16", 5e-3), ("int8", 0.05), ("int8-dynamic", 0.2)])
def test_logits_stay_near_the_float_ones(weight_format: Format, atol: float, tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source", tied=True)
    shrink(source, tmp_path / "out" / "model.onnx", weight_format, "cpu")
    logits = run(tmp_path / "out" / "model.onnx")["logits"]
    np.testing.assert_allclose(logits, decode(weights(), tied=True), atol=atol)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_with_text_the_head_reads_rounded_activations(
    weight_format: Format, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgemix.export.quantization.graph.dynamic.CHANNELS_PER_OUTLIER", 2
    )  # as many channels apart as a large head has
    source, text = write_decoder(tmp_path / "source", tied=tied), np.random.default_rng(2).integers(3, 70, (4, 16))
    logits = []
    for name, calibration in (("blocks", None), ("rows", text.tolist())):
        output = tmp_path / name / "model.onnx"
        quantize(source, output, weight_format, target="cpu", calibration=calibration)
        products = [node.op_type for node in ir.load(output).graph if node.op_type.startswith("MatMul")]
        assert products.count("MatMulIntegerToFloat") == products.count("MatMul") == (name == "rows")
        logits.append(run(output)["logits"])
    np.testing.assert_allclose(logits[1], logits[0], atol=0.05)
    assert np.abs(logits[1] - logits[0]).max() > 0


def initializers(path: Path) -> dict[str, ir.Value]:
    return dict(ir.load(path).graph.initializers)


@pytest.mark.parametrize("weight_format", [weight_format for weight_format in EMITTERS if weight_format != "fp32"])
def test_tied_tables_are_stored_once_and_positions_stay_float(weight_format: Format, tmp_path: Path) -> None:
    shrink(write_decoder(tmp_path / "source", tied=True), tmp_path / "model.onnx", weight_format, "cpu")
    stored = initializers(tmp_path / "model.onnx")
    tables = [value for value in stored.values() if value.const_value.size >= VOCABULARY * HIDDEN]
    kinds = {"fp16": ir.DataType.FLOAT16, "int8-dynamic": ir.DataType.INT8}
    assert [value.dtype for value in tables] == [kinds.get(weight_format, ir.DataType.UINT8)]
    assert stored["positions"].dtype == ir.DataType.FLOAT


def test_activations_are_quantised_token_by_token(tmp_path: Path) -> None:
    """Perplexity of int8-dynamic was half as high again while all tokens shared one 8-bit scale: a huge one crushed
    the rest, and a token's result hung on what else was in the call."""
    shrink(write_decoder(tmp_path / "source", tied=False), tmp_path / "model.onnx", "int8-dynamic")
    assert "MatMulIntegerToFloat" in {node.op_type for node in ir.load(tmp_path / "model.onnx").graph}
    together = run(tmp_path / "model.onnx")["logits"]
    alone = run(tmp_path / "model.onnx", IDS[1:])["logits"]
    np.testing.assert_array_equal(together[1:], alone)


def test_int8_dynamic_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs calibration text"):
        quantize(tmp_path / "model.onnx", tmp_path / "out.onnx", "int8-dynamic", target="cpu")


@pytest.mark.parametrize("weight_format", EMITTERS)
def test_equal_sources_give_equal_bytes_without_paths(weight_format: Format, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        source = write_decoder(tmp_path / f"source-{name}", tied=True)
        shrink(source, tmp_path / name / "model.onnx", weight_format, "cpu")
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(files[0]) == {"model.onnx", "model.onnx.data"}
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0]["model.onnx"]


def test_dynamic_activations_on_cuda_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int8-dynamic does not run on cuda") as error:
        quantize(tmp_path / "model.onnx", tmp_path / "out.onnx", "int8-dynamic", target="cuda")
    assert "int8" in error.value.remedy


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny Llamas whose hidden size, 80, no block divides: the head tied or not, the cache shared or growing."""
    folder = tmp_path_factory.mktemp("exported")
    options = {
        "shared": {"num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": True},
        "growing": {"num_attention_heads": 4, "tie_word_embeddings": False},
    }
    paths = {}
    for kind, differing in options.items():
        graph = export_graph(
            tiny_model("llama", hidden_size=80, **differing),
            folder / kind,
            target="cpu",
            gate=lambda _path, _config: GraphParity(prefill=0, decode=0, padded_batch=0, limit=1),
        )
        assert graph.config.cache == kind
        paths[kind] = graph.path
    return paths


KL = {"fp32": 1e-9, "fp16": 1e-5, "int8": 3e-3, "int8-dynamic": 6e-3, "int4": 0.15, "nf4": 0.2}
"""Limits for tiny random models, several times what is measured."""


@pytest.mark.parametrize("cache", ["shared", "growing"])
@pytest.mark.parametrize(
    ("weight_format", "target"),
    [
        (weight_format, target)
        for weight_format in EMITTERS
        for target in TARGETS
        if (weight_format, target) != ("int8-dynamic", "cuda")
    ],
)
def test_exported_models_stay_close(
    weight_format: Format, target: Target, cache: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    """CUDA's graphs are run on the CPU provider, which computes their float16 operators too."""
    shrink(exported[cache], tmp_path / "model.onnx", weight_format, target)
    ids = np.random.default_rng(1).integers(3, 160, (2, 24))
    reference, outputs = run(exported[cache], ids), run(tmp_path / "model.onnx", ids)
    assert outputs.keys() == reference.keys()
    half = target == "cuda" and weight_format != "fp32"
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.float16 if half else np.float32)}
    exact = log_softmax(reference["logits"])
    assert (np.exp(exact) * (exact - log_softmax(outputs["logits"]))).sum(-1).mean() < KL[weight_format]
    if cache == "growing":
        first = run(tmp_path / "model.onnx", ids[:, :20])
        rest = run(tmp_path / "model.onnx", ids[:, 20:], {k: v for k, v in first.items() if k != "logits"})
        # Rounding falls the other way where float activations differ in their last bits.
        atol = 0.1 if weight_format == "int8-dynamic" else 0.05 if half else 1e-4
        np.testing.assert_allclose(rest["logits"], outputs["logits"][:, 20:], atol=atol)


def test_files_shrink(exported: dict[str, Path], tmp_path: Path) -> None:
    sizes = {}
    for weight_format in EMITTERS:
        shrink(exported["shared"], tmp_path / weight_format / "model.onnx", weight_format, "cpu")
        sizes[weight_format] = (tmp_path / weight_format / "model.onnx.data").stat().st_size
    assert sizes["fp32"] > 1.7 * sizes["fp16"]
    assert sizes["fp16"] > 1.4 * sizes["int8"] > 1.8 * sizes["int4"]


def write_norm(folder: Path) -> Path:
    """x = embed[ids], y = x / sqrt(mean(x^2) + 1e-6), written out; the logits are y @ identity plus the ids' halves."""
    table = np.full((32, 16), 0.001, np.float32)
    table[1] = 3000 * np.arange(1, 17)
    constants = {"table": table, "two": np.float32(2), "tiny": np.float32(1e-12), "half": np.float32(0.5)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[-1]),
        helper.make_node("Add", ["mean", "tiny"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["y"]),
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["ids", "half"], ["logits_of_ids"]),
        helper.make_node("Identity", ["y"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 16]),
            helper.make_tensor_value_info("logits_of_ids", TensorProto.FLOAT, ["b", "s"]),
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    path = folder / "norm.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def test_norms_do_not_overflow_in_float16(tmp_path: Path) -> None:
    """Squares of activations over 256 are infinite in float16, those of small ones zero."""
    source = write_norm(tmp_path)
    quantize(source, tmp_path / "model.onnx", "fp16", target="cuda")
    outputs, expected = run(tmp_path / "model.onnx", np.array([[0, 1]])), run(source, np.array([[0, 1]]))
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.float16)}
    for name, array in outputs.items():
        np.testing.assert_allclose(array, expected[name], rtol=2e-3)


def test_half_keeps_finite_values_finite_and_none_becomes_zero() -> None:
    values = np.array([0.0, 1.5, -3.4e38, 1e-12, -1e-12, np.inf], np.float32)
    half = to_half(values)
    assert half[0] == 0
    assert half[1] == 1.5
    assert half[2] == np.finfo(np.float16).min
    assert half[3] > 0 > half[4]
    assert np.isinf(half[5])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_errs_by_half_a_step_at_most(bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(3).standard_normal((9, 50)).astype(np.float32)
    weight[4] = 0
    blocks = rtn(weight, bits=bits, block=32, symmetric=symmetric)
    assert blocks.codes.shape == (9, 2, 32)
    assert blocks.packed_codes().shape == (9, 2, 32 * bits // 8)
    step = np.repeat(blocks.scales.astype(np.float32), 32, axis=1)[:, :50]
    # An asymmetric block's zero point is rounded too, and its ends are then clipped by up to half a step more.
    assert (np.abs(blocks.dequantized() - weight) <= step * (0.51 if symmetric else 1.01)).all()
    assert not blocks.dequantized()[4].any()


def test_nf4_is_what_bitsandbytes_reads() -> None:
    weight = np.random.default_rng(5).standard_normal((6, 128)).astype(np.float32)
    codes, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    np.testing.assert_array_equal(nf4_dequantized(weight), functional.dequantize_4bit(codes, state).numpy())


def test_hqq_lowers_the_error_norm_that_it_minimizes() -> None:
    weight = np.random.default_rng(4).standard_normal((64, 128)).astype(np.float32)
    errors = {
        name: (np.abs(quantizer(weight).dequantized() - weight) ** 0.7).mean()
        for name, quantizer in {
            "rtn": partial(rtn, bits=4, block=32, symmetric=False),
            "hqq": partial(hqq, bits=4, block=32),
        }.items()
    }
    assert errors["hqq"] < 0.95 * errors["rtn"]


def test_int4_takes_the_chosen_algorithm(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source", tied=True)
    for algorithm in ("rtn", "hqq"):
        quantize(source, tmp_path / algorithm / "model.onnx", "int4", target="cpu", algorithm=algorithm)
    codes = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("rtn", "hqq")]
    assert codes[0] != codes[1]
