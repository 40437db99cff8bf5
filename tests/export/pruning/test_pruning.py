"""Pruning from end to end: cuts, recovery, report, and the folder it writes."""

from __future__ import annotations

import copy
import json
import os
import signal
from itertools import count

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from helpers.trained_models import text, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgemix.bundle.reader import read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.bundle.writer import BundleWriter
from edgemix.errors import InputError, ParityError, RecipeError
from edgemix.export.parity.limits import PruningLimits, enforce
from edgemix.export.pipeline import export_bundle
from edgemix.export.pruning import report
from edgemix.export.pruning.prune import LENGTH, PruningTexts, prune, prune_model, prune_texts
from edgemix.export.pruning.report import compare, sparsity
from edgemix.export.pruning.structure import Sizes
from edgemix.export.stages import graphs, models
from edgemix.files import acquire_lock
from edgemix.progress import NO_PROGRESS
from edgemix.recipe.compression import Pruning
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource
from edgemix.runtime import Mixture

PROSE = [f"the {animal} sat on the {place}, and all was well with the {animal}.\n" * 12
         for animal in ("cat", "dog", "owl", "fox") for place in ("mat", "log", "bough")]  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    return PruningTexts(text(1, 600), text(9, 24).tolist())


def weights(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_report_covers_all_kinds_of_pruning(texts):
    model = trained()
    before = weights(model)
    pruned = prune_model(model, Pruning(layers=0.25, ffn=0.5, heads=0.5, sparsity=0.5), texts, recovery_steps=10)
    report = pruned.report
    assert same(weights(model), before)
    assert report.before == Sizes(4, 128, 2)
    assert report.after == Sizes(3, 64, 1)
    assert report.recovery_steps == 10
    assert report.recovery_seconds > 0
    assert not pruned.model.training

    assert [part.name for part in report.parts] == [*(f"model.layers.{i}" for i in range(4)), "outside layers"]
    gone = [part for part in report.parts if part.parameters_after == 0]
    assert len(gone) == 1
    assert (gone[0].zeros, gone[0].sparsity, gone[0].bytes_after) == (0, 0.0, 0)
    layer = report.parts[0] if report.parts[0].parameters_after else report.parts[1]
    assert layer.parameters_before == 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert layer.parameters_after == 64 * 32 + 2 * 64 * 16 + 64 * 32 + 3 * 64 * 64 + 2 * 64
    assert layer.zeros == (layer.parameters_after - 2 * 64) // 2
    assert layer.bytes_before == 4 * layer.parameters_before
    # Linears: half of them at 4 bytes and a bit for each; norms as they were.
    linears = layer.parameters_after - 2 * 64
    assert layer.bytes_after == 4 * linears // 2 + linears // 8 + 4 * 2 * 64
    outside = report.parts[-1]
    assert outside.parameters_before == outside.parameters_after == 64 * 64 + 64

    total = report.total
    assert total.parameters_before == sum(p.numel() for p in model.parameters()) == report.figures.parameters_before
    assert total.parameters_after == sum(p.numel() for p in pruned.model.parameters())
    assert total.zeros == sum(int((p == 0).sum()) for p in pruned.model.parameters())
    assert report.figures.sparsity == pytest.approx(0.5, abs=0.01) == sparsity(pruned.model)


def test_figures_match_their_formulas(texts):
    model = trained()
    other = prune_model(model, Pruning(ffn=0.5), texts, recovery_steps=0).model
    figures = compare(model, other, texts.held_out)
    ids = torch.tensor(texts.held_out)
    with torch.no_grad():
        p, q = (each(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for each in (model, other))
    targets = ids[:, 1:, None]
    assert figures.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    ratio = float((p.gather(2, targets).mean() - q.gather(2, targets).mean()).exp())
    assert figures.perplexity_ratio == pytest.approx(ratio, rel=1e-4)
    assert figures.tokens == ids[:, 1:].numel()
    same_model = compare(model, model, texts.held_out)
    assert (same_model.kl, same_model.perplexity_ratio) == (0.0, 1.0)


@pytest.mark.parametrize("pruning", [Pruning(ffn=0.75), Pruning(sparsity=0.75)])
def test_recovery_helps(texts, pruning):
    model = trained()
    bare, recovered = (prune_model(model, pruning, texts, recovery_steps=steps).report for steps in (0, 40))
    assert bare.recovery_steps == 0
    assert recovered.figures.kl < 0.7 * bare.figures.kl
    assert recovered.figures.perplexity_ratio < bare.figures.perplexity_ratio


def test_several_cuts_are_better_than_one(texts):
    """With the same total number of steps."""
    model = trained()
    once = prune_model(model, Pruning(sparsity=0.65), texts, recovery_steps=30).report.figures.kl
    often = prune_model(model, Pruning(sparsity=0.65, steps=3), texts, recovery_steps=10).report.figures.kl
    assert often < 0.9 * once


def test_layers_removed_in_several_cuts_are_indexed_in_the_original(texts):
    model = trained()
    report = prune_model(model, Pruning(layers=0.5, steps=2), texts, recovery_steps=2).report
    assert sum(part.parameters_after == 0 for part in report.parts) == 2
    assert report.after == Sizes(2, 128, 2)


def test_recovery_runs_when_the_cut_rounds_to_nothing(texts):
    model = trained()
    pruned = prune_model(model, Pruning(ffn=0.01), texts, recovery_steps=1)
    assert pruned.report.after == pruned.report.before
    assert pruned.model is not model


def test_the_pattern_2_4_needs_no_sparsity(texts):
    report = prune_model(trained(), Pruning(pattern="2:4"), texts, recovery_steps=0).report
    assert report.figures.sparsity == 0.5


def test_minutes_are_a_budget(texts):
    report = prune_model(trained(), Pruning(sparsity=0.5, steps=2, recover=0.5 / 60), texts).report
    assert 0.4 < report.recovery_seconds < 3
    assert report.recovery_steps > 2
    assert prune_model(trained(), Pruning(sparsity=0.5, recover=0), texts).report.recovery_steps == 0


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (Pruning(), "removes nothing"),
        (Pruning(ffn=1.0), "ffn"),
        (Pruning(sparsity=0.6, pattern="2:4"), "two of every four"),
        (Pruning(layers=float("nan")), "layers"),
    ],
)
def test_invalid_pruning_is_refused_before_any_work(pruning, message):
    with pytest.raises(InputError, match=message):
        prune_model(None, pruning, None)


class InterruptAt:
    """A progress callback that raises Ctrl-C after a number of recovery steps, or at a stage."""

    def __init__(self, *, step=None, stage=None):
        self.step, self.stage_name, self.steps = step, stage, count(1)

    def advance(self, amount=1.0, note=""):
        if note.startswith("step ") and next(self.steps) == self.step:
            signal.raise_signal(signal.SIGINT)

    def progress(self):
        listener = type(NO_PROGRESS)()
        listener.advance = self.advance
        real = listener.stage

        def stage(title, total=None):
            if title == self.stage_name:
                raise KeyboardInterrupt
            return real(title, total)

        listener.stage = stage
        return listener


OPTIONS = {"recovery_steps": 6}
CUTS = Pruning(layers=0.25, ffn=0.5, sparsity=0.5, steps=2)


@pytest.fixture(scope="module")
def whole(texts):
    return prune_model(trained(), CUTS, texts, **OPTIONS)


@pytest.mark.parametrize("press", [{"step": 3}, {"step": 9}, {"stage": "cut 2 of 2"}, {"stage": "compare"}], ids=str)
def test_an_interrupted_run_gives_the_same_result(press, whole, texts, tmp_path):
    model = trained()
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, CUTS, texts, scratch=tmp_path, progress=InterruptAt(**press).progress(), **OPTIONS)
    assert list(tmp_path.iterdir())
    resumed = prune_model(model, CUTS, texts, scratch=tmp_path, **OPTIONS)
    assert same(weights(resumed.model), weights(whole.model))
    assert resumed.report.parts == whole.report.parts
    assert resumed.report.figures == whole.report.figures
    assert resumed.report.recovery_steps == whole.report.recovery_steps == 12


def test_finished_cuts_are_not_repeated(texts, tmp_path):
    model = trained()
    prune_model(model, CUTS, texts, scratch=tmp_path, **OPTIONS)
    prune_model(model, CUTS, texts, scratch=tmp_path, progress=InterruptAt(stage="calibrate").progress(), **OPTIONS)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_cut_is_repeated(damage, whole, texts, tmp_path):
    """A truncated file raised a safetensors error; a missing config.json gave a model with billions of weights."""
    model = trained()
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, CUTS, texts, scratch=tmp_path, progress=InterruptAt(step=3).progress(), **OPTIONS)
    if damage == "gone":
        (tmp_path / "cut-1" / "config.json").unlink()
    else:
        os.truncate(tmp_path / "cut-1" / "model.safetensors", 1000)
    resumed = prune_model(model, CUTS, texts, scratch=tmp_path, **OPTIONS)
    assert same(weights(resumed.model), weights(whole.model))


def test_a_run_with_another_key_starts_over(texts, tmp_path):
    """Other settings, text or weights must not resume from an existing state."""
    prune_model(trained(), Pruning(ffn=0.25), texts, scratch=tmp_path, recovery_steps=2)
    for model, pruning, seen in (
        (trained(), Pruning(ffn=0.5), texts),
        (trained(), Pruning(ffn=0.25), PruningTexts(text(5, 100), texts.held_out)),
        (_nudged(trained()), Pruning(ffn=0.25), texts),
    ):
        fresh = prune_model(model, pruning, seen, recovery_steps=2)
        again = prune_model(model, pruning, seen, scratch=tmp_path, recovery_steps=2)
        assert same(weights(fresh.model), weights(again.model))


def _nudged(model):
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    return changed


def test_training_and_held_out_text_are_disjoint():
    tokenizer = tiny_tokenizer()
    long = ["".join(chr(97 + letter) for letter in np.random.default_rng(i).integers(0, 26, 9000)) for i in range(8)]
    texts = prune_texts({"a": long[:4], "b": long[4:]}, tokenizer)
    assert texts.training.shape[1] == LENGTH
    judged = {tuple(window) for window in texts.held_out}
    assert judged
    assert not judged & set(map(tuple, texts.training.tolist()))
    assert same_texts(texts, prune_texts({"a": long[:4], "b": long[4:]}, tokenizer))
    assert not same_texts(texts, prune_texts({"a": long[:4], "b": long[4:]}, tokenizer, seed=1))


def same_texts(one, other):
    return np.array_equal(one.training, other.training) and one.held_out == other.held_out


def test_one_short_text_is_split_by_windows():
    texts = prune_texts({"a": ["lazy dogs and quick foxes " * 60]}, tiny_tokenizer())
    assert len(texts.held_out) == 1
    assert texts.held_out[0] not in texts.training.tolist()
    tiny = prune_texts({"a": ["no more than one window"]}, tiny_tokenizer())
    assert len(tiny.training) == len(tiny.held_out) == 1
    with pytest.raises(InputError, match="needs text"):
        prune_texts({}, tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_model("llama", vocab_size=288).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_from_folder_to_folder(folder, tmp_path):
    output = tmp_path / "new" / "smaller"
    report = prune(str(folder), output, {"prose": PROSE}, Pruning(ffn=0.33, sparsity=0.5), recovery_steps=2)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 64
    assert sum(p.numel() for p in model.parameters()) == report.figures.parameters_after
    assert sparsity(model) == pytest.approx(0.5, abs=0.01)
    assert AutoTokenizer.from_pretrained(output).encode("the cat") == tiny_tokenizer().encode("the cat")
    assert "license: mit" in (output / "README.md").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["smaller"]
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"


def test_a_stopped_run_resumes(folder, tmp_path):
    options = {"recovery_steps": 4}
    pruning = Pruning(ffn=0.33, steps=2)
    prune(str(folder), tmp_path / "whole", {"prose": PROSE}, pruning, **options)
    press = InterruptAt(step=6)
    with pytest.raises(KeyboardInterrupt):
        prune(str(folder), tmp_path / "parts", {"prose": PROSE}, pruning, progress=press.progress(), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts.pruning", "whole"]
    prune(str(folder), tmp_path / "parts", {"prose": PROSE}, pruning, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other


def test_an_existing_output_or_a_running_one_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        prune(str(folder), tmp_path, {"prose": PROSE}, Pruning(ffn=0.33))
    lock = acquire_lock(tmp_path / ".out.lock")
    with pytest.raises(InputError, match="another run"):
        prune(str(folder), tmp_path / "out", {"prose": PROSE}, Pruning(ffn=0.33))
    lock.release()


def test_the_parity_gate_checks_a_pruned_model(texts):
    figures = prune_model(trained(), Pruning(layers=0.75), texts, recovery_steps=0).report.figures
    assert figures.kl > figures.kl_limit
    with pytest.raises(
        ParityError, match=r"member 'a' is too far from the model before pruning .*kl .* \(limit 0\.5\)"
    ) as e:
        enforce(figures, member="a")
    assert "recover" in e.value.remedy
    assert enforce(figures, forced=True)
    good = prune_model(trained(), Pruning(sparsity=0.1), texts, recovery_steps=0).report
    assert not enforce(good.figures)
    assert not good.over_limits


def exported(folder, output, pruning, *, force=False, **options):
    """A bundle of one pruned member."""
    (folder.parent / "text.txt").write_text("".join(PROSE))
    data = Data(calibration={"prose": TextSource("text.txt")})
    member = MemberRecipe("a", "base", prune=pruning)
    recipe = Recipe(members=(member,), data=data, folder=folder.parent, **{"format": "int8", **options})
    return export_bundle(recipe, output, force=force)


def test_a_pruned_member_in_a_bundle(folder, tmp_path):
    """Limits are loose, because the weights are random and all of them matter."""
    plain = exported(folder, tmp_path / "plain", None)
    manifest = exported(folder, tmp_path / "bundle", Pruning(ffn=0.33, sparsity=0.5, recover=0.02), force=True)
    verify_bundle(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    member = manifest.members[0]
    assert member.pruning.sparsity == pytest.approx(0.5, abs=0.01)
    assert member.pruning.parameters_after == member.pruning.parameters_before - 2 * 3 * 32 * 64
    assert member.source.parameters == member.pruning.parameters_before == plain.members[0].source.parameters
    assert member.forced is (member.pruning.kl > member.pruning.kl_limit)
    assert plain.members[0].pruning is plain.members[0].sparse is None
    assert "members/a/model.onnx.data.sparse" in manifest.files
    assert "members/a/model.onnx.data" not in manifest.files
    assert member.sparse.size > manifest.files["members/a/model.onnx.data.sparse"].size
    with Mixture.load(tmp_path / "bundle", provider="cpu") as mixture:
        assert len(mixture.generate("the cat", max_new_tokens=4).token_ids) == 4


def test_a_member_pruned_earlier_is_also_stored_sparse(folder, tmp_path):
    prune(str(folder), folder.parent / "sparse", {"prose": PROSE}, Pruning(pattern="2:4"), recovery_steps=0)
    data = Data(calibration={"prose": TextSource("text.txt")})
    recipe = Recipe(members=(MemberRecipe("a", "sparse"),), data=data, folder=folder.parent, format="fp16")
    (folder.parent / "text.txt").write_text("".join(PROSE))
    member = export_bundle(recipe, tmp_path / "bundle").members[0]
    assert member.pruning is None
    assert member.sparse is not None


def test_a_stopped_export_keeps_the_pruned_model(folder, tmp_path, monkeypatch):
    pruning = Pruning(ffn=0.33, recover=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "export_graph", _power_cut)
        with pytest.raises(KeyboardInterrupt):
            exported(folder, tmp_path / "bundle", pruning, force=True)
    with monkeypatch.context() as patch:
        patch.setattr(models, "prune_member", _power_cut)
        exported(folder, tmp_path / "bundle", pruning, force=True)
    with monkeypatch.context() as patch:
        patch.setattr(models, "prune_member", _power_cut)
        patch.setattr(BundleWriter, "finish", _power_cut)
        with pytest.raises(KeyboardInterrupt):  # other settings are another stage
            exported(folder, tmp_path / "bundle", Pruning(ffn=0.34, recover=0.01), force=True)


def _power_cut(*_, **__):
    raise KeyboardInterrupt


def test_the_export_stops_at_the_gate(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PRUNING_LIMITS", PruningLimits(kl=1e-9, perplexity_ratio=1.0))
    graph = []
    monkeypatch.setattr(graphs, "export_graph", lambda *_, **__: graph.append(1))
    with pytest.raises(ParityError, match="too far from the model before pruning"):
        exported(folder, tmp_path / "bundle", Pruning(ffn=0.33, recover=0))
    assert not graph  # nothing is built of a model that will not pass


def test_pruning_without_text_is_refused(folder, tmp_path):
    recipe = Recipe(members=(MemberRecipe("a", "base", prune=Pruning(ffn=0.5)),), folder=folder.parent)
    with pytest.raises(RecipeError, match=r"members\[0\].prune: needs text"):
        export_bundle(recipe, tmp_path / "bundle")
    empty = Recipe(members=(MemberRecipe("a", "base", prune=Pruning()),), folder=folder.parent)
    with pytest.raises(RecipeError, match="removes nothing"):
        export_bundle(empty, tmp_path / "bundle")
