"""The layout of a decoder: its parts compute what the model computes, in every family."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch.nn import functional

from edgemix.errors import InputError
from edgemix.export.models.layout import DecoderLayer, Layout, Norm, Part, layout

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gpt2", "gpt_neox", "opt", "gemma2"]
IDS = torch.arange(3, 35).view(1, 32)


def normalized(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True) if norm.centered else x
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.gain
    return x if norm.bias is None else x + norm.bias


def linear(part: Part, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, part.weight, part.bias)


def recorded(module: torch.nn.Module, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into and comes out of a module."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_heads_compute_what_the_modules_do(family: str) -> None:
    model = tiny_model(family)
    parts = layout(model)
    assert len(parts.layers) == 2
    for norm in (parts.layers[1].attention_norm, parts.layers[1].mlp_norm, parts.final_norm):
        read, made = recorded(norm.module, model)
        torch.testing.assert_close(normalized(norm, read), made, rtol=1e-3, atol=1e-3)
    assert linear(parts.head, torch.zeros(64)).shape == (160,)
    assert parts.tied == (parts.head.module.weight is parts.embedding.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_channels_flow_through_the_parts_named(family: str) -> None:
    """With keys and queries zero, attention averages the values so far; the MLP is down(act(gate) * up)."""
    model = tiny_model(family, **({"sliding_window": 64} if family == "gemma2" else {}))
    layer = layout(model).layers[0]
    layer.query.set_weight(torch.zeros_like(layer.query.weight))
    if layer.query.bias is not None:
        layer.query.set_bias(torch.zeros_like(layer.query.bias))
    # A norm over zero queries stays zero, so every score is zero.
    read, _ = recorded(layer.query.module, model)
    heard, _ = recorded(layer.output.module, model)
    values = linear(layer.value, read).view(1, 32, layer.key_value_heads, layer.head_dim)
    values = values.repeat_interleave(layer.heads // layer.key_value_heads, 2).flatten(2)
    means = values.cumsum(1) / torch.arange(1, 33)[:, None]
    torch.testing.assert_close(heard, means, rtol=1e-3, atol=1e-4)

    up, _ = recorded(layer.up.module, model)
    down, _ = recorded(layer.down.module, model)
    assert down.shape[-1] == len(layer.up.weight) == layer.down.weight.shape[1]
    if layer.gate is None:
        assert torch.equal(linear(layer.up, up) > 1, down > activation(model)(torch.tensor(1.0)))
    else:
        expected = activation(model)(linear(layer.gate, up)) * linear(layer.up, up)
        torch.testing.assert_close(down, expected, rtol=1e-3, atol=1e-4)


def activation(model: torch.nn.Module) -> torch.nn.Module:
    return next(m for m in model.modules() if any(word in type(m).__name__ for word in ("GELU", "SiLU", "ReLU")))


def test_a_part_of_a_packed_linear_is_set_alone() -> None:
    for family in ("gpt2", "phi3", "gpt_neox"):
        layer = layout(tiny_model(family)).layers[0]
        before = [part.weight.clone() for part in layer.attention_readers]
        layer.key.set_weight(before[1] + 1)
        torch.testing.assert_close(layer.key.weight, before[1] + 1)
        assert torch.equal(layer.query.weight, before[0])
        assert torch.equal(layer.value.weight, before[2])


def test_every_linear_of_the_layers_has_its_name() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        linears = layout(model).linears()
        assert all(model.get_submodule(name) is part.module for name, part in linears.items())
        weights = sum(part.weight.numel() for part in linears.values())
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2]
        around = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        around |= {id(table.weight) for table in layout(model).positions}
        assert weights == sum(p.numel() for p in matrices if id(p) not in around)


def test_gemma_adds_one_to_its_gains_and_normalizes_its_outputs() -> None:
    layer = layout(tiny_model("gemma2")).layers[0]
    assert layer.mlp_norm.offset == 1
    assert len(layer.later_norms) == 2
    assert layout(tiny_model("llama")).layers[0].later_norms == ()


@pytest.mark.parametrize(
    ("family", "options", "about"),
    [
        ("mixtral", {}, "without any of"),
        ("falcon", {}, "without any of"),
        ("olmo2", {}, "without any of input_layernorm"),
        ("opt", {"do_layer_norm_before": False}, "post-norm|final_layer_norm"),
        ("opt", {"word_embed_proj_dim": 32}, "project_out"),
    ],
)
def test_an_unknown_structure_is_refused(family: str, options: dict[str, object], about: str) -> None:
    with pytest.raises(InputError, match=about):
        layout(tiny_model(family, **options))


def test_the_layout_is_a_view() -> None:
    model = tiny_model("llama")
    found: Layout = layout(model)
    layer: DecoderLayer = found.layers[1]
    layer.attention_norm.set_gain(torch.full((64,), 3.0))
    assert model.model.layers[1].input_layernorm.weight[0] == 3
