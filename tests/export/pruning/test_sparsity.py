"""Weights set to zero: which, in which pattern, and that they stay zero through training and every format."""

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as ir
import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.trained_models import text, trained

from edgemix.errors import InputError
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.pruning.packing import pack_weights
from edgemix.export.pruning.recovery import recover
from edgemix.export.pruning.report import compare, sparsity
from edgemix.export.pruning.sparsity import keep_mask, linears, sparsify
from edgemix.export.quantization import quantize
from edgemix.export.quantization.algorithms.gptq import gptq
from edgemix.export.quantization.algorithms.hqq import hqq
from edgemix.export.quantization.algorithms.learned_rounding import learn_rounding
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.training.loop import TrainingBudget
from edgemix.runtime.graphs.decoder import DecoderGraph

WINDOWS = text(2, 64).tolist()
HELD_OUT = text(9, 24).tolist()
IDS = text(3, 2)


def divergence(teacher, model):
    return compare(teacher, model, HELD_OUT).kl


def sparse(model, share=0.5, **options):
    """A copy with zeros."""
    pruned = copy.deepcopy(model)
    sparsify(pruned, share, windows=WINDOWS, **options)
    return pruned


def skewed(model):
    """The same function with other numbers: what a norm hands on is scaled up or down channel by channel, and the
    linears behind it make up for that, so that small weights meet large activations.
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for layer in changed.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            scales = torch.exp2(torch.randint(-3, 4, norm.weight.shape, generator=generator).float())
            norm.weight.mul_(scales)
            for reader in readers:
                reader.weight.div_(scales)
    return changed


def test_wanda_compares_the_weights_of_an_output():
    scores = torch.tensor([[1.0, 2, 3, 4], [10, 40, 30, 20]])
    assert keep_mask(scores, 0.5, "unstructured", by_row=True).tolist() == [
        [False, False, True, True],
        [False, True, True, False],
    ]
    assert keep_mask(scores, 0.5, "unstructured", by_row=False).tolist() == [[False] * 4, [True] * 4]


def test_two_of_every_four():
    scores = torch.tensor([[1.0, 2, 3, 4, 8, 7, 6, 5, 1, 0]])
    assert keep_mask(scores, 0.5, "2:4", by_row=True).int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 1, 1]]
    # Half of the way there, the group that loses less is thinned out.
    assert keep_mask(scores, 0.25, "2:4", by_row=True).int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]


def test_equal_scores_keep_the_exact_number():
    assert int(keep_mask(torch.ones(7, 10), 0.3, "unstructured", by_row=True).sum()) == 49
    assert int(keep_mask(torch.ones(7, 12), 0.5, "2:4", by_row=True).sum()) == 42
    assert keep_mask(torch.ones(3, 4), 0.0, "unstructured", by_row=True).all()


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_sparsity_is_the_requested_one(name, criterion):
    model = tiny_model(name)
    windows = np.random.default_rng(0).integers(3, 160, (8, 24)).tolist()
    for pattern, share in (("unstructured", 0.7), ("2:4", 0.5)):
        pruned = copy.deepcopy(model)
        sparsify(pruned, share, pattern=pattern, criterion=criterion, windows=windows)
        assert sparsity(pruned) == pytest.approx(share, abs=0.01)
        for part in linears(pruned).values():
            assert not torch.signbit(part.weight[part.weight == 0]).any()
            if pattern == "2:4":
                assert int((part.weight.reshape(-1, 4) != 0).sum(1).max()) <= 2
    head = model.get_output_embeddings().weight
    assert torch.equal(pruned.get_output_embeddings().weight, head)


def test_wanda_without_text_is_refused():
    with pytest.raises(InputError, match="calibration text"):
        sparsify(tiny_model("llama"), 0.5)


def test_magnitude_works_for_unsupported_structures():
    model = tiny_model("mixtral")
    sparsify(model, 0.5, criterion="magnitude")
    assert sparsity(model) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_beats_magnitude_where_activations_are_skewed(pattern):
    model = trained()
    other = skewed(model)
    assert divergence(model, other) < 1e-6
    wanda = divergence(model, sparse(other, pattern=pattern))
    magnitude = divergence(model, sparse(other, pattern=pattern, criterion="magnitude"))
    assert wanda < 0.5 * magnitude


def test_wanda_is_the_best_pattern_of_2_4():
    model = trained()
    anywhere, pattern = (divergence(model, sparse(model, pattern=pattern)) for pattern in ("unstructured", "2:4"))
    generator = torch.Generator().manual_seed(0)
    chance = copy.deepcopy(model)
    for part in linears(chance).values():
        scores = torch.rand(part.weight.shape, generator=generator)
        part.set_weight(torch.where(keep_mask(scores, 0.5, "2:4", by_row=True), part.weight, 0.0))
    assert anywhere < pattern < 0.5 * divergence(model, chance)


def test_recovery_lowers_the_divergence_and_keeps_every_zero():
    model = trained()
    pruned = sparse(model, 0.6)
    zeros = {name: part.weight == 0 for name, part in linears(pruned).items()}
    before = divergence(model, pruned)
    embeddings = pruned.model.embed_tokens.weight.clone()
    state = recover(pruned, model, text(1, 500), budget=TrainingBudget(25), learning_rate=1e-3)
    assert state.steps == 25
    assert divergence(model, pruned) < 0.6 * before
    for name, part in linears(pruned).items():
        assert torch.equal(part.weight == 0, zeros[name])
    assert torch.equal(pruned.model.embed_tokens.weight, embeddings)
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    assert not any(part.module.weight._backward_hooks for part in linears(pruned).values())


def test_recovery_of_an_unpruned_model_has_zero_loss():
    model = trained()
    state = recover(copy.deepcopy(model), model, text(1, 64), budget=TrainingBudget(1))
    assert state.loss == pytest.approx(0.0, abs=1e-4)  # in bfloat16, where that pays


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_keeps_zeros_exactly(bits, symmetric):
    weight = np.random.default_rng(0).normal(0.3, 1, (32, 80)).astype(np.float32)
    weight[np.random.default_rng(1).random(weight.shape) < 0.5] = 0
    weight[3] = 0
    weight[4] = np.abs(weight[4])  # blocks of one sign
    found = [rtn(weight, bits=bits, block=32, symmetric=symmetric).dequantized()]
    if not symmetric:  # the other algorithms always have zero points
        inputs = np.random.default_rng(2).normal(size=(400, 80)).astype(np.float32)
        found.append(gptq(weight, inputs.T @ inputs / 200, bits=bits, block=32).dequantized())
        found.append(hqq(weight, bits=bits, block=32).dequantized())
    for matrix in found:
        assert (matrix[weight == 0] == 0).all()


@pytest.fixture(scope="module")
def pruned():
    model = trained()
    return sparse(model)


@pytest.fixture(scope="module")
def graph(pruned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    return export_graph(pruned, folder, target="cpu")


def stored_linears(path):
    """Return the dequantized weights [N, K] of a graph's quantized products."""
    for node in ir.load(path).graph:
        if node.op_type == "MatMulNBits":
            bits = node.attributes.get_int("bits", 4)
            codes = node.inputs[1].const_value.numpy()
            if bits == 4:
                codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
            zero = np.full(codes.shape[:2], 1 << (bits - 1))
            if len(node.inputs) > 3 and node.inputs[3] is not None:
                packed = node.inputs[3].const_value.numpy().reshape(len(codes), -1)
                packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(codes), -1) if bits == 4 else packed
                zero = packed[:, : codes.shape[1]]
            yield codes.astype(int) - zero[..., None]
        elif node.op_type in ("MatMul", "Gemm") and node.inputs[1].const_value is not None:
            yield node.inputs[1].const_value.numpy()


@pytest.mark.parametrize("weight_format", ["fp16", "int8", "int4", "int8-dynamic"])
def test_every_format_keeps_zeros_and_its_bundle_is_smaller(weight_format, pruned, graph, tmp_path):
    path = tmp_path / "model.onnx"
    quantize(graph.path, path, weight_format, target="cpu", calibration=WINDOWS)
    zeros = sum(int((part.weight == 0).sum()) for part in linears(pruned).values())
    if weight_format in ("int8", "int4"):
        assert sum(int((codes == 0).sum()) for codes in stored_linears(path)) >= zeros
    before = DecoderGraph.load(path, graph.config).forward(IDS)
    plain = (tmp_path / "model.onnx.data").stat().st_size
    assert pack_weights(path) is not None
    assert (tmp_path / "model.onnx.data.sparse").stat().st_size < {"fp16": 0.65, "int4": 0.92}.get(
        weight_format, 0.75
    ) * plain
    after = DecoderGraph.load(path, graph.config).forward(IDS)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_learned_rounding_keeps_zeros(pruned):
    table = learn_rounding(pruned, text(1, 64), steps=12)
    for part in linears(pruned).values():
        weight = part.weight.numpy()
        found = table.find(np.ascontiguousarray(weight))
        assert found is not None
        assert (found.dequantized()[weight == 0] == 0).all()
