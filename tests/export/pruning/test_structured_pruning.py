"""Structured pruning: the smaller model is what is left of the larger one, and what is left was chosen well."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.trained_models import text, trained
from transformers import AutoConfig, AutoModelForCausalLM

from edgemix.errors import InputError
from edgemix.export.pruning import importance as measuring
from edgemix.export.pruning.importance import Importance, importance, second_moments
from edgemix.export.pruning.report import compare
from edgemix.export.pruning.structure import Sizes, Structure
from edgemix.export.pruning.structured import cut, layers_to_keep, remove_units, sizes
from edgemix.recipe.compression import Pruning

FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "mistral-window", "phi3", "gemma2", "gpt_neox", "opt", "smollm3"]
UNTIED_HEADS = ["llama", "qwen2", "qwen3", "mistral-window", "phi3", "gemma2", "smollm3"]
"""Those whose head size is a number of its own."""
WINDOWS = np.random.default_rng(0).integers(3, 160, (8, 40)).tolist()
IDS = torch.tensor(WINDOWS[:3])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def saved_and_read(model, folder):
    """Save the model and load it again with transformers."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(teacher, model):
    return compare(teacher, model, text(9, 24).tolist()).kl


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_zero_channels_changes_nothing(name, tmp_path):
    """The cut model equals the masked one: there is nothing to compensate for."""
    model = tiny_model(name)
    structure = Structure(model)
    wanted = sizes(model, Pruning(ffn=0.3))
    dead = torch.from_numpy(np.random.default_rng(0).permutation(structure.sizes.ffn)[wanted.ffn :])
    for layer in structure.layers:
        weight = layer.down.weight.clone()
        weight[:, dead] = 0
        layer.down.set_weight(weight)
    before = logits(model)
    smaller = cut(model, wanted, importance(model, WINDOWS, sizes=wanted))
    assert Structure(smaller).sizes == wanted
    assert wanted.ffn < structure.sizes.ffn
    torch.testing.assert_close(logits(smaller), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(saved_and_read(smaller, tmp_path / "m")), logits(smaller))
    torch.testing.assert_close(logits(model), before)  # the larger one is as it was


@pytest.mark.parametrize("name", UNTIED_HEADS)
def test_removing_zero_heads_changes_nothing(name, tmp_path):
    model = tiny_model(name)
    structure = Structure(model)
    for index, layer in enumerate(structure.layers):
        weight = layer.output.weight.clone()
        weight[:, index * structure.group : (index + 1) * structure.group] = 0  # another one in each layer
        layer.output.set_weight(weight)
    wanted = sizes(model, Pruning(heads=0.5))
    assert wanted == Sizes(2, structure.sizes.ffn, 1)
    smaller = cut(model, wanted, importance(model, WINDOWS, sizes=wanted))
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(saved_and_read(smaller, tmp_path / "m")), logits(smaller))
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_an_identity_layer_changes_nothing(name, tmp_path):
    model = tiny_model(name, num_hidden_layers=3)
    structure = Structure(model)
    for part in (structure.layers[1].down, structure.layers[1].output):
        part.set_weight(torch.zeros_like(part.weight))
        if part.bias is not None:
            part.set_bias(torch.zeros_like(part.bias))
    wanted = sizes(model, Pruning(layers=0.33))
    measured = importance(model, WINDOWS, sizes=wanted)
    assert layers_to_keep(structure.sizes, wanted, measured) == [0, 2]
    smaller = cut(model, wanted, measured)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(saved_and_read(smaller, tmp_path / "m")), logits(smaller))


def test_layer_types_follow_their_layers():
    """gemma2's windows alternate: the configuration of the smaller model names those of the layers that stay."""
    model = tiny_model("gemma2", num_hidden_layers=4)
    kinds = model.config.layer_types
    distances = torch.tensor([3.0, 0.0, 2.0, 1.0])
    smaller = cut(model, Sizes(2, 96, 2), Importance(layers=distances))
    assert smaller.config.layer_types == [kinds[0], kinds[2]]
    old, new = (each.state_dict() for each in (model, smaller))
    assert torch.equal(new["model.layers.1.mlp.up_proj.weight"], old["model.layers.2.mlp.up_proj.weight"])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "stablelm"])
def test_unsupported_numbers_of_heads_are_refused(name):
    model = tiny_model(name)
    wanted = Sizes(2, Structure(model).sizes.ffn, 1)
    with pytest.raises(InputError, match=r"cannot have|does not take") as caught:
        cut(model, wanted, importance(model, WINDOWS, sizes=wanted))
    assert "Leave heads out" in caught.value.remedy


def test_unsupported_structures_are_refused():
    with pytest.raises(InputError, match="structure that edgemix does not know"):
        sizes(tiny_model("mixtral"), Pruning(ffn=0.5))


def test_remaining_columns_compensate_for_removed_ones():
    """The weights are the least-squares solution on the remaining inputs, up to the damping."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    inputs = torch.randn(4000, 24, generator=generator) @ mix
    weight = torch.randn(10, 24, generator=generator)
    moment = inputs.T @ inputs / len(inputs)
    kept, new = remove_units(weight, moment, 15)
    wanted = inputs @ weight.T
    best = torch.linalg.lstsq(inputs[:, kept], wanted).solution.T
    torch.testing.assert_close(new[:, kept], best, rtol=0.05, atol=0.05)
    gone = sorted(set(range(24)) - set(kept.tolist()))
    assert torch.equal(new[:, gone], torch.zeros(10, 9))

    def error(columns):
        solution = torch.linalg.lstsq(inputs[:, columns], wanted).solution
        return float((inputs[:, columns] @ solution - wanted).square().sum())

    others = [torch.randperm(24, generator=generator)[:15] for _ in range(200)]
    assert error(kept) < min(map(error, others))


def test_columns_of_a_unit_are_removed_together():
    """A unit of four columns in which one column alone would score differently."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 16, generator=generator)
    weight = torch.randn(8, 16, generator=generator)
    weight[:, 4:8] *= 0.3
    kept, new = remove_units(weight, inputs.T @ inputs / 2000, 3, size=4)
    assert kept.tolist() == [0, 2, 3]
    assert torch.equal(new[:, 4:8], torch.zeros(8, 4))


def test_inputs_that_are_always_zero_are_handled():
    moment = torch.zeros(8, 8)
    moment[:4, :4] = torch.eye(4)
    kept, new = remove_units(torch.ones(3, 8), moment, 4)
    assert kept.tolist() == [0, 1, 2, 3]
    assert torch.equal(new[:, :4], torch.ones(3, 4))
    assert remove_units(torch.ones(3, 8), torch.zeros(8, 8), 4)[1].isfinite().all()


def test_second_moments_are_exact(monkeypatch):
    monkeypatch.setattr(measuring, "has_fast_bfloat16", lambda _: False)
    monkeypatch.setattr(measuring, "BATCH_TOKENS", 60)
    model = tiny_model("llama")
    module = model.model.layers[1].mlp.down_proj
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    windows = [*WINDOWS[:3], WINDOWS[3][:7]]
    for window in windows:
        model(input_ids=torch.tensor([window]))
    handle.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(
        second_moments(model, [module], windows)[module], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
    )
    assert not module._forward_pre_hooks


def test_importance_beats_random_and_magnitude():
    model, windows = trained(), text(2, 64).tolist()
    wanted = sizes(model, Pruning(ffn=0.5))
    measured = importance(model, windows, sizes=wanted)
    structure = Structure(model)

    def naive(score):
        channels = [score(layer).topk(wanted.ffn).indices.sort().values for layer in structure.layers]
        return structure.resized(range(4), channels, [torch.arange(2)] * 4, {})

    generator = torch.Generator().manual_seed(0)
    chance = [divergence(model, naive(lambda _: torch.rand(128, generator=generator))) for _ in range(3)]
    magnitude = divergence(model, naive(lambda layer: layer.down.weight.norm(dim=0)))
    ours = divergence(model, cut(model, wanted, measured))
    assert wanted.ffn == 64
    assert ours < 0.5 * magnitude
    assert magnitude < min(chance)


def test_heads_by_importance_beat_the_other_heads():
    model, windows = trained(), text(2, 64).tolist()
    wanted = sizes(model, Pruning(heads=0.5))
    structure = Structure(model)
    everything = [torch.arange(128)] * 4
    fixed = [
        divergence(model, structure.resized(range(4), everything, [torch.tensor([head])] * 4, {})) for head in range(2)
    ]
    assert divergence(model, cut(model, wanted, importance(model, windows, sizes=wanted))) < 0.5 * min(fixed)


def test_the_least_important_layer_is_removed():
    model, windows = trained(), text(2, 64).tolist()
    wanted = sizes(model, Pruning(layers=0.25))
    structure = Structure(model)

    def without_layer(index):
        kept = [other for other in range(4) if other != index]
        return structure.resized(kept, [torch.arange(128)] * 3, [torch.arange(2)] * 3, {})

    each = [divergence(model, without_layer(index)) for index in range(4)]
    assert divergence(model, cut(model, wanted, importance(model, windows, sizes=wanted))) == min(each)


@pytest.mark.parametrize(
    ("ffn", "share", "expected"),
    [(1536, 0.125, 1344), (1536, 0.34, 1024), (1536, 0.001, 1536), (96, 0.33, 64), (96, 0.9, 32), (80, 0.2, 64)],
)
def test_channels_are_multiples_of_the_block_size(ffn, share, expected):
    model = tiny_model("llama", intermediate_size=ffn)
    assert sizes(model, Pruning(ffn=share)).ffn == expected
    assert sizes(model, Pruning(layers=0.5)) == Sizes(1, ffn, 2)  # what is not cut is not rounded


def test_sizes_stay_between_one_unit_and_the_original():
    model = tiny_model("llama", intermediate_size=24)
    assert sizes(model, Pruning(layers=0.95, ffn=0.95, heads=0.95)) == Sizes(1, 24, 1)


def test_heads_are_a_number_that_the_configuration_accepts():
    """Llama's configuration wants the width to be a multiple of the heads: of five pairs, two and one are possible."""
    model = tiny_model("llama", hidden_size=80, num_attention_heads=10, num_key_value_heads=5)
    found = [sizes(model, Pruning(heads=share)).key_value_heads for share in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert found == [5, 4, 4, 2, 1]


def test_sizes_of_intermediate_cuts():
    model = tiny_model("llama", num_hidden_layers=4, intermediate_size=1024)
    pruning = Pruning(layers=0.5, ffn=0.5)
    steps = [sizes(model, pruning, share) for share in (0.25, 0.5, 0.75, 1.0)]
    assert steps[-1] == Sizes(2, 512, 2)
    assert [step.ffn for step in steps] == [896, 768, 640, 512]
    assert all(before.layers >= after.layers for before, after in pairwise(steps))


def test_unmeasured_importance_is_an_error():
    with pytest.raises(ValueError, match="channels was not measured"):
        cut(tiny_model("llama"), Sizes(2, 64, 2), Importance())


def test_several_cuts_at_once(tmp_path):
    model, windows = trained(), text(2, 64).tolist()
    wanted = sizes(model, Pruning(layers=0.25, ffn=0.25, heads=0.5))
    smaller = cut(model, wanted, importance(model, windows))
    assert Structure(smaller).sizes == wanted == Sizes(3, 96, 1)
    assert sum(p.numel() for p in smaller.parameters()) < 0.65 * sum(p.numel() for p in model.parameters())
    assert smaller.model.embed_tokens.weight is smaller.lm_head.weight
