"""The whole walk with small members trained on the spot: text, experts, recipe, bundle, mixture, evaluation."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from edgemix.bundle.reader import read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.errors import InputError
from edgemix.export.demo import run as demo_module
from edgemix.export.demo.run import DemoReport, run_demo
from edgemix.export.demo.text import make_texts
from edgemix.export.pipeline import export_bundle
from edgemix.recipe.load import load_recipe
from edgemix.runtime import Mixture

DOMAINS = ("code", "prose")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    return run_demo(tmp_path_factory.mktemp("demo") / "demo", tiny=True)


@pytest.fixture(scope="module")
def mixture(demo: DemoReport) -> Mixture:
    return Mixture.load(demo.bundle, provider="cpu", threads=1)


def bits(demo: DemoReport, row: str, domain: str | None = None) -> float:
    figures = demo.evaluation.row(row)
    return (figures.files[domain] if domain else figures.overall).bits_per_byte


def test_an_expert_is_best_on_its_own_domain(demo):
    assert bits(demo, "code", "code") < min(bits(demo, "prose", "code"), bits(demo, "base", "code")) - 0.1
    assert bits(demo, "prose", "prose") < min(bits(demo, "code", "prose"), bits(demo, "base", "prose")) - 0.1


def test_the_fitted_mixture_beats_every_member_and_the_uniform_one(demo):
    others = ("base", "code", "prose", "uniform")
    assert bits(demo, "fitted") < min(bits(demo, name) for name in others) - 0.02
    for domain in DOMAINS:
        assert bits(demo, f"fitted to {domain}", domain) < bits(demo, domain, domain)


def test_fitted_weights_know_the_domains(demo):
    weights = read_manifest(demo.bundle).weights
    assert weights.method == "fit"
    for domain in DOMAINS:
        assert max(weights.domains[domain], key=weights.domains[domain].__getitem__) == domain
        assert sum(weights.domains[domain].values()) == pytest.approx(1)


def test_the_bundle_is_whole_and_within_its_parity_limits(demo):
    manifest = read_manifest(demo.bundle)
    verify_bundle(demo.bundle, manifest)
    for member in manifest.members:
        assert member.format == "int8"
        assert not member.forced
        assert member.parity.decode <= member.parity.limit
        assert member.quantization is not None
        assert 0 <= member.quantization.kl <= member.quantization.kl_limit


def test_scores_are_those_of_the_evaluation(demo, mixture):
    texts = make_texts(demo.recipe.parent / "data")["prose"].test
    scores = mixture.score(texts, weights="prose", window=256)
    total = sum(score.log_probabilities.sum() for score in scores)
    tokens = sum(len(score.log_probabilities) for score in scores)
    figures = demo.evaluation.row("fitted to prose").files["prose"]
    assert tokens == figures.tokens
    assert np.exp(-total / tokens) == pytest.approx(figures.perplexity)


def test_text_comes_out(mixture):
    assert mixture.next_token_distribution("def read(").sum() == pytest.approx(1)
    prompts = ["def read(self", "The following"]
    batch = mixture.generate(prompts, max_new_tokens=12)
    assert [completion.text for completion in batch] == [
        mixture.generate(prompt, max_new_tokens=12).text for prompt in prompts
    ]
    assert all(completion.text for completion in batch)
    pieces = [chunk.text for chunk in mixture.stream(prompts[0], max_new_tokens=12)]
    assert "".join(pieces) == batch[0].text


def test_log_probabilities_are_the_same_alone_and_in_a_batch(mixture):
    """To the last bit, and within 1e-6 with drafts, as the guide says."""
    prompts = ["def read(path):", "The module provides", "x"]
    options = {"max_new_tokens": 24, "speculation": "off"}
    alone = [mixture.generate(prompt, **options) for prompt in prompts]
    with mixture.serve(most=2) as server:
        served = [handle.result() for handle in [server.submit(prompt, max_new_tokens=24) for prompt in prompts]]
    drafted = [mixture.generate(prompt, max_new_tokens=24) for prompt in prompts]
    for one, *others in zip(alone, mixture.generate(prompts, **options), served, strict=True):
        assert all(np.array_equal(one.log_probabilities, other.log_probabilities) for other in others)
    for one, other in zip(alone, drafted, strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-6, rtol=0)


def test_samples_of_each_domain(demo):
    assert [sample.domain for sample in demo.samples] == list(DOMAINS)
    assert all(sample.text for sample in demo.samples)


def test_no_document_serves_twice(demo):
    for texts in make_texts(demo.recipe.parent / "data").values():
        assert texts.train
        assert texts.validation
        assert texts.test
        training = "\n".join(texts.train)
        assert not set(texts.validation) & set(texts.test)
        assert not any(text in training for text in texts.validation + texts.test)


def test_running_again_only_measures(demo, monkeypatch):
    monkeypatch.setattr(demo_module, "export_bundle", None)
    monkeypatch.setattr(demo_module, "train_member", None)
    again = run_demo(demo.recipe.parent, tiny=True)
    assert again.evaluation == demo.evaluation
    assert again.samples == demo.samples


def test_new_weights_make_a_new_bundle(demo, monkeypatch):
    called = []
    monkeypatch.setattr(demo_module, "export_bundle", lambda recipe, output, **_: called.append(output))
    weights = demo.recipe.parent / "members" / "code" / "model.safetensors"
    before = weights.stat()
    os.utime(weights, (before.st_atime + 10_000, before.st_mtime + 10_000))
    run_demo(demo.recipe.parent, tiny=True)
    os.utime(weights, (before.st_atime, before.st_mtime))
    assert called == [demo.bundle]


def test_the_recipe_gives_the_same_bytes_again(demo, tmp_path):
    again = export_bundle(load_recipe(demo.recipe), tmp_path / "again")
    assert again.files == read_manifest(demo.bundle).files
    assert again.weights == read_manifest(demo.bundle).weights


def test_another_demos_folder_is_refused(demo, tmp_path):
    with pytest.raises(InputError, match="holds other files"):
        run_demo(demo.recipe.parent / "data", tiny=True)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        run_demo(tmp_path, tiny=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_the_demos_model_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tiny"):
        run_demo(tmp_path / "demo")
    assert not list(tmp_path.iterdir())
