"""Costs of quantizing: close to what is measured, and in its order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model

from edgemix.export.models.layout import layout
from edgemix.export.quantization.algorithms.gptq import gptq
from edgemix.export.quantization.statistics.calibration import calibrate, output_gradients
from edgemix.export.quantization.statistics.sensitivity import quantization_costs
from edgemix.export.training.losses import divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = np.random.default_rng(0).integers(3, 160, (12, 48)).tolist()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(WINDOWS), use_cache=False).logits.flatten(0, 1)


def measured(model: PreTrainedModel) -> list[float]:
    """KL with each linear quantized to 4 bits for the same text."""
    before, linears = logits(model), layout(model).linears()
    gradients = output_gradients(model, WINDOWS)
    statistics = {
        name: s for each in calibrate(model, WINDOWS, gradients=gradients) for name, s in each.statistics.items()
    }
    found = []
    for name, part in linears.items():
        weight = part.weight.clone()
        blocks = gptq(weight, statistics[name].hessian, bits=4, block=32, sweeps=0)
        part.set_weight(torch.from_numpy(blocks.dequantized()))
        found.append(float(divergence(before, logits(model))))
        part.set_weight(weight)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_costs_are_near_and_in_the_order_of_measured_ones(family: str) -> None:
    model = tiny_model(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = quantization_costs(model, WINDOWS, block=32)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert list(found) == list(layout(model).linears())
    real = np.array(measured(model))
    estimated = np.array([cost[4] for cost in found.values()])
    assert np.corrcoef(np.log(real), np.log(estimated))[0, 1] > 0.9
    assert 0.6 < estimated.sum() / real.sum() < 1.7


def test_eight_bits_cost_a_hundredth() -> None:
    for cost in quantization_costs(tiny_model("llama"), WINDOWS, block=32).values():
        assert 0 < cost[8] < 0.02 * cost[4]


def test_a_linear_that_nothing_reads_costs_nothing() -> None:
    model = tiny_model("llama")
    layer = layout(model).layers[1]
    layer.down.set_weight(torch.zeros_like(layer.down.weight))
    found = quantization_costs(model, WINDOWS, block=32)
    assert found["model.layers.1.mlp.up_proj"][4] == 0
    assert found["model.layers.0.mlp.up_proj"][4] > 0
