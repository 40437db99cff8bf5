"""The student before it learns: how large it becomes, what it is cut from, and what settling makes of it."""

from __future__ import annotations

import copy
import json

import msgspec
import pytest
import torch
from helpers.distillation_setting import LAYERS, LENGTH, TEXTS, recipe_in, write_setting
from helpers.tiny_models import tiny_model
from transformers import LlamaConfig

from edgemix.errors import InputError
from edgemix.export.data.text import windows
from edgemix.export.distillation.student import (
    SHARE,
    Shape,
    average_model,
    decoding_cost,
    default_layers,
    evenly_spaced_layers,
    fit_down_projections,
    new_student,
    shrink,
)
from edgemix.export.models.layout import layout
from edgemix.export.models.loading import load_model, load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.pruning.importance import Importance
from edgemix.export.pruning.structure import Sizes, Structure
from edgemix.export.pruning.structured import cut
from edgemix.export.training.losses import divergence
from edgemix.recipe.compression import Pruning


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def expert(setting):
    return load_model(locate("animals", setting))


@pytest.fixture(scope="module")
def ids(setting):
    tokenizer = load_tokenizer(locate("animals", setting))
    return torch.tensor(windows(TEXTS["animals"], tokenizer, LENGTH, seed=0))


def apart(one, other, ids):
    with torch.no_grad():
        return divergence(*(each(input_ids=ids[:8]).logits.flatten(0, 1) for each in (one, other))).item()


SMOLLM2 = Shape(30, 884_736, 2_654_208, 28_311_552)
"""SmolLM2-135M."""


def test_the_cost_is_what_was_measured():
    """Milliseconds a token, SmolLM2-135M and cuts of it (random weights), two cores."""
    measured = {
        ("int8", 30, 1536): 7.1, ("int4", 30, 1536): 4.78, ("int4", 10, 1536): 2.07, ("int4", 8, 1536): 1.81,
        ("int4", 6, 1536): 1.50, ("int4", 14, 640): 2.19,
    }  # fmt: skip
    costs = {
        (form, layers, ffn): decoding_cost(SMOLLM2._replace(layers=layers, ffn=SMOLLM2.ffn * ffn / 1536), form, "cpu")
        for form, layers, ffn in measured
    }
    unit = costs["int8", 30, 1536] / 7.1
    for key, milliseconds in measured.items():
        assert costs[key] / unit == pytest.approx(milliseconds, rel=0.05), key


def test_a_shape_is_its_models():
    assert Shape.of(tiny_model("llama")) == (2, 64 * 64 * 3, 3 * 64 * 96, 160 * 64)
    assert Shape.of(tiny_model("llama"), Sizes(1, 48, 1)) == (1, 64 * 64 * 1.5, 3 * 64 * 48, 160 * 64)
    assert Shape.of(tiny_model("gpt2")) == (2, 64 * 64 * 4, 2 * 64 * 256, 160 * 64)


@pytest.mark.parametrize(("member", "layers"), [("int8", 10), ("int4", 5), ("fp32", 30)])
def test_the_default_student_decodes_in_a_third_of_the_time(member, layers):
    assert default_layers(SMOLLM2, member, "int4", "cpu") == layers
    share = decoding_cost(SMOLLM2._replace(layers=layers), "int4", "cpu") / decoding_cost(SMOLLM2, member, "cpu")
    assert share <= SHARE


def test_a_model_that_is_nearly_all_head_keeps_two_layers():
    assert default_layers(Shape(4, 100, 100, 10**9), "int4", "int4", "cpu") == 2


@pytest.mark.parametrize(("layers", "keep"), [(30, 10), (30, 4), (12, 5), (6, 5), (6, 6), (2, 2), (3, 1)])
def test_layers_that_stay(layers, keep):
    kept = evenly_spaced_layers(layers, keep)
    assert len(set(kept)) == keep
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert keep == 1 or kept[-1] == layers - 1
    if keep >= 5:
        assert kept[1] == 1
        assert kept[-2] == layers - 2


def test_settling_makes_up_for_most_of_what_went(expert, ids):
    kept = evenly_spaced_layers(LAYERS, 3)
    now = Structure(expert).sizes
    rank = torch.zeros(LAYERS)
    rank[kept] = 1
    bare = cut(expert, Sizes(3, now.ffn, now.key_value_heads), Importance(layers=rank))
    before = copy.deepcopy(bare)
    fit_down_projections(bare, expert, kept, ids)
    assert apart(expert, bare, ids) < 0.5 * apart(expert, before, ids)
    differing = [name for name, each in bare.state_dict().items() if not torch.equal(each, before.state_dict()[name])]
    assert all("down_proj" in name for name in differing)


def test_where_nothing_went_settling_changes_nothing(expert, ids):
    same = copy.deepcopy(expert)
    fit_down_projections(same, expert, range(LAYERS), ids)
    assert apart(expert, same, ids) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox", "opt", "gemma2"])
def test_every_family_can_be_cut_and_settled(name):
    model = tiny_model(name, num_hidden_layers=4)
    ids = torch.randint(3, 150, (8, 16), generator=torch.Generator().manual_seed(0))
    made = shrink(model, Sizes(2, 96, Structure(model).sizes.key_value_heads), ids)
    assert len(layout(made).layers) == 2
    assert len(layout(model).layers) == 4
    with torch.no_grad():
        assert torch.isfinite(made(input_ids=ids).logits).all()


def test_channels_and_heads_as_the_recipe_says(setting):
    recipe = recipe_in(setting, prune=Pruning(layers=0.5, ffn=0.34, heads=0.5))
    made = begin(recipe).model
    assert Structure(made).sizes == Sizes(3, 64, 1)


def begin(recipe, distance=lambda model: 0.0):
    tokenizer = load_tokenizer(locate("animals", recipe.folder))
    ids = torch.tensor(windows([text for texts in TEXTS.values() for text in texts], tokenizer, LENGTH, seed=0))
    return new_student(recipe, recipe.weights, tokenizer, ids, distance=distance)


def test_the_start_is_whatever_is_closest_to_the_mixture(setting, expert):
    other = load_model(locate("numbers", setting))
    whole = Pruning()
    average = average_model(expert, 0.6, [(other, 0.4), (tiny_model("llama"), 0.5)])
    seen = []

    def best_is(model):
        """The distance that makes this model the best."""

        def distance(candidate):
            seen.append(candidate)
            return sum(
                (a - b).abs().sum().item() for a, b in zip(candidate.parameters(), model.parameters(), strict=True)
            )

        return distance

    for wanted in (expert, average):
        made = begin(recipe_in(setting, prune=whole), best_is(wanted)).model
        assert best_is(wanted)(made) < 0.02
    named = begin(recipe_in(setting, prune=whole, start="numbers"), best_is(expert)).model
    assert best_is(other)(named) < 0.02
    weight = average.model.layers[0].mlp.up_proj.weight
    parts = [model.model.layers[0].mlp.up_proj.weight for model in (expert, other)]
    torch.testing.assert_close(weight, 0.6 * parts[0] + 0.4 * parts[1])
    assert average_model(expert, 0.6, [(tiny_model("llama"), 0.4)]) is None


def config(folder, **changes):
    found = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(found.to_dict() | changes))
    return str(folder)


def test_a_student_from_a_configuration(setting, tmp_path):
    recipe = recipe_in(setting, config=config(tmp_path / "own"))
    made, again = begin(recipe), begin(recipe)
    tokenizer = load_tokenizer(locate("animals", setting))
    assert made.decoding is None
    assert made.model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert made.model.config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(made.model.lm_head.weight, again.model.lm_head.weight)
    different = begin(msgspec.structs.replace(recipe, seed=1))
    assert not torch.equal(made.model.lm_head.weight, different.model.lm_head.weight)


@pytest.mark.parametrize("wrong", ["missing", "unknown"])
def test_a_configuration_that_is_none(setting, tmp_path, wrong):
    folder = str(tmp_path) if wrong == "missing" else config(tmp_path / "own", model_type="no-such-model")
    with pytest.raises(InputError, match=r"student\.config"):
        begin(recipe_in(setting, config=folder))
