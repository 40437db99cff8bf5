"""Members of one base in one graph: the bundle is that of graphs for each, but for its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from edgemix.bundle.reader import read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.errors import InputError
from edgemix.export.budget.plan import ResourceBudget
from edgemix.export.pipeline import export_bundle
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource
from edgemix.runtime import Mixture

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters on it, a model of another kind, and a text."""
    folder = tmp_path_factory.mktemp("recipe")
    for name, architecture in (("base", "llama"), ("other", "gpt2")):
        tiny_model(architecture, vocab_size=288).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        modules = ["q_proj", "o_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=4 + seed, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny_model("llama", vocab_size=288), config).save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


MATH, CODE = (MemberRecipe(name, "base", adapter=name) for name in ("math", "code"))
PLAIN, OTHER = MemberRecipe("plain", "base"), MemberRecipe("other", "other")


def recipe(folder: Path, **changes: Any) -> Recipe:
    text = {"prose": TextSource("text.txt")}
    options = {"members": (MATH, OTHER, CODE, PLAIN), "data": Data(validation=text, max_tokens=600), "stack": True}
    return Recipe(**(options | {"folder": folder} | changes))


@pytest.fixture(scope="module")
def bundles(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Manifest]]:
    output = tmp_path_factory.mktemp("out")
    return {
        stack: (output / str(stack), export_bundle(recipe(folder, stack=stack, format="fp32"), output / str(stack)))
        for stack in (True, False)
    }


def test_members_of_one_base_share_a_graph(bundles: dict[bool, tuple[Path, Manifest]]) -> None:
    output, manifest = bundles[True]
    assert read_manifest(output) == manifest
    verify_bundle(output, manifest)
    assert [member.name for member in manifest.members] == ["math", "code", "plain", "other"]
    assert {member.graph for member in manifest.members} == {"stacks/math/model.onnx", "members/other/model.onnx"}
    assert [member.config.member_count for member in manifest.members] == [3, 3, 3, 1]
    assert all(member.quantization is not None for member in manifest.members[:3])
    sizes = [sum(path.stat().st_size for path in bundles[stack][0].rglob("*.data")) for stack in (True, False)]
    assert sizes[0] < 0.7 * sizes[1]


def test_the_mixture_is_the_same(bundles: dict[bool, tuple[Path, Manifest]]) -> None:
    with Mixture.load(bundles[True][0]) as stacked, Mixture.load(bundles[False][0]) as apart:
        weights = {"math": 0.4, "code": 0.3, "plain": 0.2, "other": 0.1}
        one, other = (each.score(TEXT[:900], weights=weights) for each in (stacked, apart))
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)
        for chosen in ("adaptive", weights, {"code": 1.0}):
            ids = [
                each.generate("the quick", weights=chosen, max_new_tokens=40, speculation=how).token_ids
                for each, how in ((stacked, "auto"), (apart, "auto"), (stacked, "off"))
            ]
            assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("weight_format", ["int8", "int8-dynamic", "int4"])
def test_formats_of_a_shared_graph_pass_the_gates_of_each_member(
    folder: Path, tmp_path: Path, weight_format: Any
) -> None:
    apart = export_bundle(recipe(folder, format=weight_format, stack=False), tmp_path / "apart", force=True)
    found = export_bundle(recipe(folder, format=weight_format), tmp_path / "bundle", force=True)
    lost = {entry.name: entry.quantization.kl for entry in found.members if entry.quantization}
    for entry in apart.members:
        assert entry.quantization is not None
        assert lost[entry.name] < 1.5 * entry.quantization.kl + 1e-6
    assert found.quantization is not None


def test_an_interrupted_export_continues_with_its_shared_graph(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemix.export.stages import mixture as mixture_stage
    from edgemix.export.stages import shared_base

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mixture_stage, "compare_mixtures", cut)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(recipe(folder), tmp_path / "bundle")
    monkeypatch.setattr(shared_base, "find_deltas", cut)
    again = export_bundle(recipe(folder), tmp_path / "bundle")
    assert again.members[0].config.member_count == 3


def test_members_that_cannot_share_a_graph_keep_their_own(folder: Path, tmp_path: Path) -> None:
    """gpt2 has embeddings of positions, too."""
    members = (OTHER, MemberRecipe("twin", "other"))
    manifest = export_bundle(recipe(folder, members=members), tmp_path / "bundle")
    assert [member.config.member_count for member in manifest.members] == [1, 1]
    assert [member.graph for member in manifest.members] == ["members/other/model.onnx", "members/twin/model.onnx"]


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    """Two full fine-tunes of the base: one that is a few ranks away from it, and one that is not."""
    for seed, (name, rank) in enumerate((("near", 2), ("far", 40))):
        model, generator = tiny_model("llama", vocab_size=288), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part, module in model.model.layers.named_modules():
                if isinstance(module, torch.nn.Linear) and "k_proj" not in part:
                    up, down = (torch.randn(size, rank, generator=generator) * 0.1 for size in module.weight.shape)
                    module.weight += up @ down.T
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def test_full_fine_tunes_of_a_named_base_share_a_graph(tuned: Path, tmp_path: Path) -> None:
    members = (MemberRecipe("near", "near"), MemberRecipe("far", "far"), MATH)
    found = export_bundle(recipe(tuned, members=members, stack="base", format="fp32"), tmp_path / "bundle")
    assert [member.config.member_count for member in found.members] == [3, 3, 3]


def test_a_member_that_needs_too_large_a_rank_has_a_graph_of_its_own(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemix.export.stages import shared_base

    monkeypatch.setattr(shared_base, "RANKS", (3, 5))
    members = (MATH, MemberRecipe("far", "far"), MemberRecipe("near", "near"))
    found = export_bundle(recipe(tuned, members=members, stack="base", format="fp32"), tmp_path / "bundle")
    counts = [(member.name, member.config.member_count) for member in found.members]
    assert counts == [
        ("math", 2),
        ("near", 2),
        ("far", 1),
    ]
    verify_bundle(tmp_path / "bundle", found)
    with Mixture.load(tmp_path / "bundle") as mixture:
        assert mixture.members == ("math", "near", "far")
        assert mixture.score("the quick brown fox").perplexity > 1


def test_a_budget_is_refused_with_shared_graphs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stack"):
        export_bundle(recipe(folder), tmp_path / "bundle", budget=ResourceBudget(bytes=10**9))
