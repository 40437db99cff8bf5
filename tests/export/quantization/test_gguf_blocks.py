"""Blocks of GGUF files: what they stand for, where they are found, and what a graph of them computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import onnx_ir as ir
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers.gguf_files import Array, pack, write, write_gguf
from helpers.quantized_graphs import log_softmax, run, without_int8_products
from helpers.tiny_models import tiny_model

from edgemix.bundle.manifest import GraphParity
from edgemix.errors import InputError
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.models.loading import load_model
from edgemix.export.models.location import Location
from edgemix.export.quantization import quantize
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.gguf_blocks import gguf_blocks
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.formats import TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgemix.formats import Target


IDS = np.random.default_rng(1).integers(3, 160, (2, 24))

KINDS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""What is repacked, and into how many bits."""


def matrices(model: PreTrainedModel) -> dict[str, Array]:
    """The weights of the linears but the head."""
    return {
        name: module.weight.numpy()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def write_one(folder: Path, stored: Array, kind: str) -> Location:
    """A GGUF file of one matrix."""
    writer = gguf.GGUFWriter(folder / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", stored, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Location(folder, "one.gguf", "one.gguf")


def uneven() -> Array:
    """A matrix [48, 96] with rows of zeros, of one value, of one sign and of very different sizes."""
    weight = np.random.default_rng(0).standard_normal((48, 96)).astype(np.float32)
    weight *= np.geomspace(1e-3, 10, 48, dtype=np.float32)[:, None]
    weight[3], weight[5], weight[7], weight[9] = 0, 0.25, -3, np.abs(weight[9])
    weight[11, :32] = -np.abs(weight[11, :32])
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_keeps_its_blocks(kind: str, tmp_path: Path) -> None:
    stored = pack(uneven(), kind)
    weight = gguf.dequantize(stored, Kind[kind])
    blocks = gguf_blocks(write_one(tmp_path, stored, kind), KINDS[kind]).find(weight)  # type: ignore[arg-type]
    assert blocks is not None
    assert blocks.bits == KINDS[kind]
    assert blocks.columns == 96
    assert (blocks.scales != 0).all()
    if kind == "Q4_1":
        assert blocks.sums == 3
        again = rtn(weight, bits=4, block=32, symmetric=False).dequantized()
        errors = np.abs(blocks.dequantized() - weight).max(1)[12:]
        assert (errors < np.abs(again - weight).max(1)[12:] / 5).all()
    else:
        assert not blocks.sums
        np.testing.assert_array_equal(blocks.dequantized(), weight)


def test_minima_that_whole_zero_points_say_need_no_sums(tmp_path: Path) -> None:
    """Such as a Q4_0 matrix that was stored as Q4_1."""
    weight = np.random.default_rng(0).integers(-8, 8, (4, 64)).astype(np.float32) / 4
    weight[:, ::32], weight[:, 1::32] = -2, 1.75
    blocks = gguf_blocks(write_one(tmp_path, pack(weight, "Q4_1"), "Q4_1"), 4).find(weight)
    assert blocks is not None
    assert not blocks.sums
    np.testing.assert_array_equal(blocks.dequantized(), weight)


@pytest.mark.parametrize(("columns", "stored", "inputs"), [(576, 20, 640), (896, 29, 928), (1536, 50, 1584)])
def test_sums_fit_the_kernels(columns: int, stored: int, inputs: int, tmp_path: Path) -> None:
    """Multiples of 8 for CUDA; four blocks at a time for CPUs, if one more makes them so."""
    packed = pack(np.random.default_rng(0).standard_normal((16, columns)).astype(np.float32), "Q4_1")
    blocks = gguf_blocks(write_one(tmp_path, packed, "Q4_1"), 4).find(gguf.dequantize(packed, Kind.Q4_1))
    assert blocks is not None
    assert (blocks.codes.shape[1], blocks.inputs) == (stored, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_that_was_loaded_is_found(kind: str, tmp_path: Path) -> None:
    """Queries and keys too, whose rows llama.cpp keeps in another order."""
    location = write(tmp_path, {}, kind)
    table = gguf_blocks(location, KINDS[kind])  # type: ignore[arg-type]
    for name, weight in matrices(load_model(location)).items():
        blocks = table.find(weight)
        assert blocks is not None, name
        np.testing.assert_allclose(blocks.dequantized(), weight, rtol=0, atol=0.02 if kind == "Q4_1" else 0)


def test_a_format_takes_what_is_small_enough_for_it(tmp_path: Path) -> None:
    mixed, wide = write(tmp_path / "mixed", {"attn_v": "Q8_0"}, "Q4_0"), write(tmp_path / "wide", {}, "Q8_0")
    assert len(gguf_blocks(mixed, 4)) == 16
    assert len(gguf_blocks(mixed, 8)) == 2
    assert len(gguf_blocks(wide, 4)) == 0
    assert len(gguf_blocks(wide, 8)) == 16


def graph_of(model: PreTrainedModel, folder: Path) -> Path:
    passed = GraphParity(prefill=0, decode=0, padded_batch=0, limit=1)
    return export_graph(model, folder, target="cpu", gate=lambda _path, _config: passed).path


def divergence(reference: Path, path: Path) -> float:
    """Mean KL of a graph's distributions from the reference's."""
    exact, found = (log_softmax(run(each, IDS)["logits"]) for each in (reference, path))
    return float((np.exp(exact) * (exact - found)).sum(-1).mean())


def with_blocks(model: PreTrainedModel, table: BlockTable) -> PreTrainedModel:
    """The model with the weights that its blocks stand for; those of embedding and head have 8 bits and no sums."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            weight = module.weight.numpy()
            blocks = table.find(weight)
            if blocks is None or (blocks.sums and (name == "lm_head" or isinstance(module, torch.nn.Embedding))):
                blocks = rtn(weight, bits=8, block=32, symmetric=True)
            module.weight.copy_(torch.from_numpy(blocks.dequantized()))
    return model


MIXED = {"attn_q": "Q4_0", "attn_k": "Q8_0", "ffn_down": "Q8_0", "ffn_gate": "Q4_0", "token_embd": "Q8_0"}


@pytest.mark.parametrize("kinds", [{}, {"": "Q4_0"}, MIXED], ids=["Q4_1", "Q4_0", "mixed"])
def test_a_graph_computes_what_its_blocks_stand_for(kinds: dict[str, str], tmp_path: Path) -> None:
    location = write(tmp_path, kinds, "Q4_1")
    model, table = load_model(location), gguf_blocks(location, 4)
    source = graph_of(model, tmp_path / "source")
    for name, known in (("kept", table), ("rounded", None)):
        quantize(source, tmp_path / name / "model.onnx", "int4", target="cpu", table=known)
    # Eight bits of activations are all that is lost.
    assert divergence(source, tmp_path / "kept" / "model.onnx") < 2e-3
    assert divergence(source, tmp_path / "rounded" / "model.onnx") > 2e-2
    logits = run(without_int8_products(tmp_path / "kept" / "model.onnx"), IDS)["logits"]
    expected = with_blocks(model, table)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_sums_are_made_once_for_all_linears_that_read_them(tmp_path: Path) -> None:
    location = write(tmp_path, {}, "Q4_1")
    source = graph_of(load_model(location), tmp_path / "source")
    quantize(source, tmp_path / "model.onnx", "int4", target="cpu", table=gguf_blocks(location, 4))
    made = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph]
    assert made.count("Concat") == 2 * 4  # layers; what goes into attention, its output, the gates and the last product
    assert made.count("ReduceSum") == ir_count(source, "ReduceSum") + 2
    assert made.count("MatMulNBits") == 2 * 4 + 1


def ir_count(path: Path, kind: str) -> int:
    return [node.op_type for node in ir.load(path).graph].count(kind)


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_survive_the_disk_and_half_precision(target: Target, tmp_path: Path) -> None:
    """CUDA's graph is run on the CPU provider, which computes its float16 operators too."""
    location = write(tmp_path, MIXED, "Q4_1")
    source = graph_of(load_model(location), tmp_path / "source")
    gguf_blocks(location, 4).save(tmp_path / "blocks.safetensors")
    table = BlockTable.load(tmp_path / "blocks.safetensors")
    quantize(source, tmp_path / "model.onnx", "int4", target=target, table=table)
    quantize(source, tmp_path / "again" / "model.onnx", "int4", target=target, table=gguf_blocks(location, 4))
    logits = run(tmp_path / "model.onnx", IDS)["logits"]
    assert logits.dtype == (np.float16 if target == "cuda" else np.float32)
    assert divergence(source, tmp_path / "model.onnx") < 2e-3
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_has_no_blocks_of_ours_is_rounded(tmp_path: Path) -> None:
    """A file as llama.cpp mixes them: K-quants, which may lie in one matrix with blocks that are kept."""
    kinds = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_up": "Q5_0"}
    location = write(tmp_path, kinds, "Q4_1", hidden_size=256)
    source = graph_of(load_model(location), tmp_path / "source")
    table = gguf_blocks(location, 4)
    for name, known in (("kept", table), ("rounded", None)):
        quantize(source, tmp_path / name / "model.onnx", "int4", target="cpu", table=known)
    kept, rounded = (divergence(source, tmp_path / name / "model.onnx") for name in ("kept", "rounded"))
    assert kept < 0.9 * rounded


def test_8_bit_matrices_are_the_files_in_int8_and_others_are_rounded(tmp_path: Path) -> None:
    location = write(tmp_path, {"ffn": "Q8_0"}, "Q4_1")
    model, table = load_model(location), gguf_blocks(location, 8)
    quantize(graph_of(model, tmp_path / "source"), tmp_path / "model.onnx", "int8", target="cpu", table=table)
    assert {
        node.attributes.get_int("bits") for node in ir.load(tmp_path / "model.onnx").graph if "bits" in node.attributes
    } == {8}
    logits = run(without_int8_products(tmp_path / "model.onnx"), IDS)["logits"]
    np.testing.assert_allclose(logits, with_blocks(model, table)(torch.from_numpy(IDS)).logits.numpy(), atol=1e-3)


def test_an_embedding_keeps_its_blocks_where_rounding_would_find_others(tmp_path: Path) -> None:
    """Blocks without a largest code, as importance matrices make them."""
    codes = np.random.default_rng(0).integers(-100, 101, (300, 2, 32)).astype(np.int8)
    step = np.full((300, 2, 1), 1e-3, np.float16)
    stored = np.concatenate([step.view(np.uint8), codes.view(np.uint8)], axis=2).reshape(300, -1)

    def packed(name: str, array: Array) -> tuple[Array, Kind]:
        return (stored if name == "token_embd.weight" else pack(array, "Q8_0")), Kind.Q8_0

    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300), packed)
    location = Location(tmp_path, "tiny.gguf", "tiny.gguf")
    source = graph_of(load_model(location), tmp_path / "source")
    quantize(source, tmp_path / "model.onnx", "int8", target="cpu", table=gguf_blocks(location, 8))
    graph = ir.load(tmp_path / "model.onnx").graph
    lookup = next(node for node in graph if node.op_type == "GatherBlockQuantized")
    np.testing.assert_array_equal(lookup.inputs[0].const_value.numpy().view(np.int8) ^ np.int8(-128), codes)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # gguf-py multiplies infinity by zero
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused(kind: str, number: float, tmp_path: Path) -> None:
    stored = pack(uneven(), kind)
    stored[4, 2 if kind == "Q4_1" else 0 :][:2] = np.array([number], np.float16).view(np.uint8)
    with pytest.raises(InputError, match=r"one\.gguf: blk\.0\.ffn_up\.weight has weights that are not finite"):
        gguf_blocks(write_one(tmp_path, stored, kind), KINDS[kind])  # type: ignore[arg-type]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    location = write_one(tmp_path, pack(uneven(), "Q4_0"), "Q4_0")
    whole = (tmp_path / "one.gguf").read_bytes()
    for length in range(0, len(whole), 97):  # of 2 kB
        (tmp_path / "one.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"one\.gguf: "):
            gguf_blocks(location, 4)
