"""A full disk is a clear error at every step, leaves nothing half-written, and loses nothing."""

import os

import pytest
from helpers.tiny_models import tiny_model, tiny_tokenizer

from edgemix.errors import EdgemixError
from edgemix.export.distillation.distill import distill
from edgemix.export.finetuning.finetune import finetune
from edgemix.export.pipeline import export_bundle
from edgemix.export.pruning.prune import prune
from edgemix.recipe.compression import Pruning, Quantization, Student
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource

if os.name != "posix":
    pytest.skip("limits of files are POSIX'", allow_module_level=True)
from helpers.full_disk import full_disk

TEXT = ["the quick brown fox jumps over the lazy dog. " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", vocab_size=300).save_pretrained(folder / "one")
    tiny_tokenizer().save_pretrained(folder / "one")
    (folder / "text.txt").write_text(TEXT[0])
    return folder


def recipe(folder, **changes):
    data = Data(calibration={"text": TextSource("text.txt")}, window=64)
    return Recipe(members=(MemberRecipe("one", "one"),), format="int8", data=data, folder=folder, **changes)


@pytest.mark.parametrize("most", [4_000, 40_000, 120_000, 260_000])
def test_an_export_ends_with_the_reason_and_goes_on_later(folder, tmp_path, most):
    """At the tokenizer, the graph, its data, kept distributions: safetensors' errors are no OSErrors."""
    rotated = recipe(folder, quantization=Quantization(rotate=True)) if most == 260_000 else recipe(folder)
    with full_disk(most), pytest.raises(EdgemixError, match=r"writing .*: (file too large|problem writing)"):
        export_bundle(rotated, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    export_bundle(recipe(folder), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    "work",
    [
        lambda folder, output: finetune(str(folder / "one"), output, TEXT, steps=2, batch=1, length=16),
        lambda folder, output: prune(str(folder / "one"), output, {"text": TEXT}, Pruning(ffn=0.3, recover=0)),
        lambda folder, output: distill(
            Recipe(
                members=(MemberRecipe("one", "one"),),
                student=Student(steps=2, batch=1, length=16),
                data=Data(training={"text": TextSource("text.txt")}),
                folder=folder,
            ),
            output,
        ),
    ],
    ids=["finetune", "prune", "distill"],
)
@pytest.mark.parametrize("most", [4_000, 20_000])
def test_training_ends_with_the_reason(folder, tmp_path, work, most):
    with full_disk(most), pytest.raises(EdgemixError, match=r"writing .*: (file too large|problem writing)"):
        work(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    work(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
