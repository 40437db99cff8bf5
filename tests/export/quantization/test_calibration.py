"""Calibration: statistics equal those of the whole model run at once, and see what earlier layers became."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.linear_inputs import linear_inputs
from helpers.tiny_models import tiny_model

from edgemix.errors import InputError
from edgemix.export.models.layout import layout
from edgemix.export.quantization.statistics import calibration
from edgemix.export.quantization.statistics.calibration import calibrate, output_gradients

WINDOWS = np.random.default_rng(0).integers(3, 160, (6, 24)).tolist()


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, and several batches."""
    monkeypatch.setattr(calibration, "has_fast_bfloat16", lambda _: False)
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 48)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma2", "phi3", "gpt2", "gpt_neox", "opt"])
def test_statistics_are_those_of_the_inputs(family: str) -> None:
    model = tiny_model(family)
    inputs = linear_inputs(model, WINDOWS)
    found = {name: s for layer in calibrate(model, WINDOWS) for name, s in layer.statistics.items()}
    assert list(found) == list(layout(model).linears())
    for name, rows in inputs.items():
        assert found[name].tokens == len(rows) == 144
        torch.testing.assert_close(found[name].hessian, 2 / 144 * rows.T @ rows, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[name].mean_absolute, rows.abs().mean(0), rtol=1e-3, atol=1e-5)


def test_a_layer_reads_what_the_replaced_layers_before_it_make() -> None:
    model, changed = tiny_model("llama"), tiny_model("llama")
    second = {}
    for index, calibrated in enumerate(calibrate(model, WINDOWS)):
        if index == 0:
            calibrated.layer.down.set_weight(calibrated.layer.down.weight * 0.5)
        else:
            second = calibrated.statistics
    down = layout(changed).layers[0].down
    before = linear_inputs(changed, WINDOWS)
    down.set_weight(down.weight * 0.5)
    after = linear_inputs(changed, WINDOWS)
    for name, statistics in second.items():
        torch.testing.assert_close(statistics.mean_absolute, after[name].abs().mean(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(statistics.mean_absolute, before[name].abs().mean(0), rtol=1e-2)


def test_linears_that_read_one_tensor_share_their_statistics() -> None:
    layer = next(iter(calibrate(tiny_model("llama"), WINDOWS)))
    assert len(layer.statistics) == 7
    assert len({id(statistics) for statistics in layer.statistics.values()}) == 4


def test_windows_of_different_lengths() -> None:
    model, windows = tiny_model("mistral-window"), [WINDOWS[0][:9], *WINDOWS[1:], WINDOWS[0][:5]]
    inputs = linear_inputs(model, windows)
    found = {name: s for layer in calibrate(model, windows) for name, s in layer.statistics.items()}
    for name, rows in inputs.items():
        torch.testing.assert_close(found[name].hessian, 2 / len(rows) * rows.T @ rows, rtol=1e-3, atol=1e-4)


def test_no_hook_stays_after_an_interruption() -> None:
    model = tiny_model("llama")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(calibrate(model, WINDOWS))
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_windows() -> None:
    with pytest.raises(InputError, match="no calibration text"):
        next(iter(calibrate(tiny_model("llama"), [])))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "phi3"])
def test_gradients_are_those_of_the_models_own_loss(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by moving one output, with labels that are sure: those the model finds most probable."""
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmax(-1, keepdim=True))
    model = tiny_model(family)
    gradients = output_gradients(model, WINDOWS[:2])
    name = next(name for name in gradients if name.endswith(("down_proj", "mlp.c_proj")))
    module, token, step = model.get_submodule(name), 5, 1e-3
    slopes = []
    with torch.no_grad():
        labels = model(input_ids=torch.tensor(WINDOWS[:1])).logits[0].argmax(-1)
    for row in range(64):

        def loss(change: float, row: int = row) -> float:
            def move(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
                output[0, token, row] += change
                return output

            handle = module.register_forward_hook(move)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(WINDOWS[:1])).logits[0].double()
            handle.remove()
            return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))

        slopes.append((loss(step) - loss(-step)) / (2 * step))
    assert gradients[name].tokens.shape == (48,)
    assert float(gradients[name].tokens[token]) == pytest.approx(sum(s * s for s in slopes), rel=0.02)
    assert float(gradients[name].rows.sum()) == pytest.approx(float(gradients[name].tokens.mean()), rel=1e-4)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_tokens_count_by_their_gradients() -> None:
    model = tiny_model("llama")
    inputs, gradients = linear_inputs(model, WINDOWS), output_gradients(model, WINDOWS)
    statistics = {
        name: s for layer in calibrate(model, WINDOWS, gradients=gradients) for name, s in layer.statistics.items()
    }
    for name, rows in inputs.items():
        weights = gradients[name].tokens / gradients[name].tokens.mean()
        expected = 2 / 144 * (rows * weights[:, None]).T @ rows
        torch.testing.assert_close(statistics[name].hessian, expected, rtol=1e-3, atol=1e-3)
