"""Rotations: the function stays to the last digits, and outlying channels are gone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.linear_inputs import linear_inputs
from helpers.tiny_models import tiny_model

from edgemix.errors import InputError
from edgemix.export.models.layout import layout
from edgemix.export.quantization.transforms.rotation import (
    _rotation,
    _rotation_around_ones,
    can_rotate,
    fold_norms,
    rotate_residual,
    rotate_values,
)
from edgemix.export.quantization.transforms.smoothing import quantize_rows

FAMILIES = ["llama", "llama-tied", "llama-head-20", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "opt"]
WINDOWS = np.random.default_rng(0).integers(3, 160, (3, 24)).tolist()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(WINDOWS), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str) -> None:
    """In double precision (norms and positions are fp32 all the same), where a mistake would show."""
    model = tiny_model(family).double()
    before, parts = logits(model), layout(model)
    parts = fold_norms(model, parts)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert all((layer.mlp_norm.gain == 1).all() for layer in parts.layers)
    parts = rotate_residual(model, parts, seed=1)
    rotate_values(parts, seed=2)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert not parts.tied


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_weights_are_turned(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    parts, old = rotate_residual(model, layout(model)), layout(plain)
    rotate_values(parts)
    for new, before in zip(parts.layers, old.layers, strict=True):
        for name in ("query", "value", "output", "up", "down"):
            assert (getattr(new, name).weight - getattr(before, name).weight).abs().mean() > 0.05, name
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)


def test_outlying_channels_are_gone() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 20
    before = linear_inputs(model, WINDOWS)["model.layers.0.mlp.up_proj"].abs().amax(0)
    rotate_residual(model, layout(model))
    after = linear_inputs(model, WINDOWS)["model.layers.0.mlp.up_proj"].abs().amax(0)
    assert before.max() / before.median() > 3 * after.max() / after.median()


def test_activations_round_better() -> None:
    """What 8-bit products see of an activation, one scale a token."""

    def error(model: torch.nn.Module) -> float:
        seen: list[torch.Tensor] = []
        linear = layout(model).layers[0].up.module
        hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
        logits(model)
        hook.remove()
        weight, rounded = linear.weight.detach(), torch.from_numpy(quantize_rows(seen[0].numpy()))
        return float(((rounded @ weight.T - seen[0] @ weight.T) ** 2).mean())

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 20
    rotated = copy.deepcopy(model)
    rotate_residual(rotated, layout(rotated))
    assert error(rotated) < 0.3 * error(model)


def test_a_rotated_model_saves_and_loads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("llama-tied")
    rotate_residual(model, layout(model))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 20, 576])
def test_rotations_are_orthogonal_and_even(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    turn = _rotation(size, generator)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64))
    assert turn.abs().max() <= (2 / size) ** 0.5 + 1e-9
    assert not torch.equal(turn, _rotation(size, generator)) or size < 3
    if size > 1:
        around = _rotation_around_ones(size, generator)
        torch.testing.assert_close(around @ around.T, torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(around.sum(1), torch.ones(size, dtype=torch.float64))


def test_where_it_cannot_be_done() -> None:
    model = tiny_model("gemma2")
    assert "normalize what they add" in str(can_rotate(layout(model)))
    with pytest.raises(InputError, match=r"cannot be rotated.*normalize"):
        rotate_residual(model, layout(model))
    model = tiny_model("gpt2")
    assert can_rotate(layout(model)) is None
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0
    assert "almost zero" in str(can_rotate(layout(model)))


def test_values_turn_where_the_residual_stream_cannot() -> None:
    model = tiny_model("gemma2")
    before = logits(model)
    rotate_values(layout(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
