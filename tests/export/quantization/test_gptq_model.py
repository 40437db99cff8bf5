"""GPTQ over whole models, models prepared for it, and bits where they matter."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.trained_linears import BLOCK, divergence, matrices, text, trained

from edgemix.errors import InputError
from edgemix.export.models.layout import layout
from edgemix.export.quantization.algorithms.gptq_model import gptq_blocks
from edgemix.export.quantization.algorithms.learned_rounding import learn_rounding
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.quantization.statistics.sensitivity import most_sensitive, quantization_costs
from edgemix.export.quantization.transforms.preparation import prepare_model
from edgemix.recipe.compression import Quantization

WINDOWS = text(1, 96).tolist()


def rounded(model, eight_bit=()):
    return {
        name: rtn(matrix, bits=8 if name in eight_bit else 4, block=BLOCK, symmetric=False).dequantized()
        for name, matrix in matrices(model).items()
    }


def found(model, table):
    return {name: table.find(matrix) for name, matrix in matrices(model).items()}


def values(blocks):
    return {name: each.dequantized() for name, each in blocks.items()}


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_it_beats_rounding(name):
    model = trained(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = gptq_blocks(model, WINDOWS, block=BLOCK)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert divergence(model, values(found(model, table))) < 0.6 * divergence(model, rounded(model))


def test_linears_get_the_bits_that_they_are_given():
    model = trained("qwen2")
    names = [name for name in matrices(model) if "down_proj" in name]
    for table in (
        gptq_blocks(model, WINDOWS, bits=dict.fromkeys(names, 8), block=BLOCK),
        learn_rounding(model, text(1, 32), bits=dict.fromkeys(names, 8), block=BLOCK, steps=2),
    ):
        bits = {name: each.bits for name, each in found(model, table).items()}
        assert {name for name, each in bits.items() if each == 8} == set(names)
        assert divergence(model, values(found(model, table))) < divergence(model, rounded(model, names))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama-tied"])
def test_prepared_models_compute_what_they_did(name):
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.tensor(WINDOWS[:2])
    prepared = prepare_model(model, Quantization(rotate=True, scale=True), WINDOWS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    weights = [each.state_dict() for each in (model, prepared)]
    assert not any(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] if key.endswith("proj.weight"))
    torch.testing.assert_close(prepared(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(InputError, match="cannot be rotated"):
        prepare_model(tiny_model("gemma2"), Quantization(rotate=True), [])


def test_bits_go_where_they_matter():
    model = trained("qwen2")
    parts = layout(model)
    cost = quantization_costs(model, WINDOWS, block=BLOCK)
    half = most_sensitive(cost, parts, 0.5)
    others = [name for name in parts.linears() if name not in half]
    sizes = {name: part.weight.numel() for name, part in parts.linears().items()}
    assert 0.5 <= sum(sizes[name] for name in half) / sum(sizes.values()) < 0.75
    groups = [group for layer in parts.layers for group in layer.groups()]
    assert all(set(group) <= set(half) or not set(group) & set(half) for group in groups)
    assert divergence(model, rounded(model, half)) < 0.7 * divergence(model, rounded(model, others))
    assert most_sensitive(cost, parts, 0) == ()
    assert most_sensitive(cost, parts, 1) == tuple(parts.linears())
