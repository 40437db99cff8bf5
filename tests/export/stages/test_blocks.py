"""Members from GGUF files: their blocks go into the bundle as they are, unless the recipe wants something else."""

from __future__ import annotations

import pytest
from helpers.exports import Spy, gguf_recipe, graphs

from edgemix.export.pipeline import export_bundle
from edgemix.export.stages import blocks
from edgemix.recipe.compression import Quantization
from edgemix.recipe.schema import Data, Recipe


@pytest.mark.parametrize(
    ("kinds", "otherwise", "weight_format"),
    [({"token_embd": "Q8_0"}, "Q4_1", "int4"), ({}, "Q4_0", "int4"), ({}, "Q8_0", "int8")],
)
def test_gguf_members_keep_the_blocks_of_their_file(kinds, otherwise, weight_format, tmp_path, monkeypatch):
    trained = Spy(monkeypatch, "learn_rounding", blocks)
    built = gguf_recipe(tmp_path / "m", kinds, otherwise, format=weight_format)
    member = export_bundle(built, tmp_path / "kept").members[0]
    assert not trained.calls
    assert member.eight_bits == 0
    text = built.data if weight_format == "int4" else Data()  # with text, rounding gives the head no blocks
    rounded = Recipe(
        members=built.members, format=weight_format, folder=built.folder, quantization=Quantization("rtn"), data=text
    )
    again = export_bundle(rounded, tmp_path / "rounded", force=True).members[0]
    if otherwise == "Q4_1":
        assert member.quantization.kl < 0.1 * again.quantization.kl
    else:
        assert member.quantization.kl < 1e-3
    assert (graphs(tmp_path / "kept") == graphs(tmp_path / "rounded")) is (weight_format == "int8")


@pytest.mark.parametrize(
    ("kinds", "changes"),
    [
        ({"ffn_up": "F16"}, {}),
        ({}, {"quantization": Quantization("distil", steps=2)}),
        ({}, {"quantization": Quantization(group=64, steps=2)}),
        ({}, {"quantization": Quantization(steps=2, eight_bits=0.1)}),
    ],
)
def test_gguf_members_are_quantized_anew_if_the_recipe_or_the_file_requires_it(kinds, changes, tmp_path, monkeypatch):
    """A file that has blocks for some weights only, and recipes that name something else."""
    trained = Spy(monkeypatch, "learn_rounding", blocks)
    built = gguf_recipe(tmp_path / "m", kinds, "Q4_0", **({"quantization": Quantization(steps=2)} | changes))
    export_bundle(built, tmp_path / "bundle", force=True)
    assert len(trained.calls) == 1
