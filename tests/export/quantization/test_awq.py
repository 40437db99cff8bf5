"""Moved scales: the model's function stays, its activations or weights become easier to round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model

from edgemix.export.models.layout import layout
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.quantization.statistics.calibration import calibrate
from edgemix.export.quantization.transforms.awq import folds, scale_weights

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt2", "gpt_neox", "opt"]
WINDOWS = np.random.default_rng(0).integers(3, 160, (4, 32)).tolist()
IDS = torch.tensor(WINDOWS[:2])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fold_keeps_the_function_for_any_scale(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    places = []
    for layer in layout(model).layers:
        for fold in folds(layer):
            heads, _, channels = fold.repeats
            weights = {name: part.weight.clone() for name, part in fold.readers.items()}
            spread = fold.apply(torch.rand(heads * channels) * 3 + 0.2)
            assert all(torch.allclose(part.weight, weights[name] * spread) for name, part in fold.readers.items())
            places.append(fold.place)
    gated = ["down"] if layout(model).layers[0].gate else []
    assert places == ["attention", "output", "mlp", *gated] * 2
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_scaled_weights_round_better_and_keep_the_function(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    for each in (model, plain):
        for layer in layout(each).layers:
            for norm in (layer.attention_norm, layer.mlp_norm):
                norm.set_gain(norm.gain * torch.exp(torch.linspace(-2, 2, 64)))
    before = logits(model)
    for calibrated in calibrate(model, WINDOWS):
        kept = {name: (p.weight.clone(), calibrated.statistics[name].hessian.clone()) for name, p in layers(calibrated)}
        taken = scale_weights(calibrated, bits=4, block=32)
        assert max(taken.values()) > 0
        scaled = unscaled = 0.0
        for name, part in layers(calibrated):
            if "c_fc" not in name:  # rows of up and value also change, which changes the outputs' own size
                scaled += lost(part.weight, calibrated.statistics[name].hessian)
                unscaled += lost(*kept[name])
        assert scaled < unscaled
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


def layers(calibrated) -> list:  # type: ignore[no-untyped-def]
    return list(calibrated.linears.items())


def lost(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of rounding under H, by the outputs' size."""
    error = weight - torch.from_numpy(rtn(weight.contiguous().numpy(), bits=4, block=32, symmetric=False).dequantized())
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


def test_statistics_of_scaled_inputs() -> None:
    model = tiny_model("llama")
    first = next(iter(calibrate(model, WINDOWS)))
    fold = next(fold for fold in folds(first.layer) if fold.place == "mlp")
    statistics = first.statistics[next(iter(fold.readers))]
    statistics.divide(fold.apply(torch.linspace(0.5, 2, 64)))
    again = next(iter(calibrate(model, WINDOWS))).statistics[next(iter(fold.readers))]
    torch.testing.assert_close(statistics.hessian, again.hessian, rtol=0.03, atol=1e-3)
    torch.testing.assert_close(statistics.mean_absolute, again.mean_absolute, rtol=0.02, atol=1e-3)
