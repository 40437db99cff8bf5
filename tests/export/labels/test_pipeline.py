"""Recipes over labels become bundles whose answers are the models'."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.label_tokenizers import hugging_face
from helpers.tiny_encoders import tiny_encoder

import edgemix
from edgemix.bundle.reader import read_any_manifest
from edgemix.errors import InputError, RecipeError
from edgemix.export.labels.pipeline import export_label_bundle
from edgemix.recipe.labeled import LabeledSource
from edgemix.recipe.labels import LabelData, LabelMemberRecipe, LabelRecipe

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["The film was good", "Angela met Barack in London", "not good at all", "a", "New York !", "the café owners"]
RULES = """
labels: [neg, pos]
axis: [neg, pos]
scores: {good: 2.0, mess: -2.0, sentimental: -1.0}
negations: [not]
"""


def save_model(folder: Path, kind: str, labels: dict[int, str], seed: int = 0) -> str:
    tokenizer = hugging_face({"bert": "bert", "roberta": "roberta"}[kind])
    model = tiny_encoder(kind, labels=len(labels), id2label=labels, vocab_size=len(tokenizer))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    save_model(folder / "one", "bert", {0: "neg", 1: "pos"}, 1)
    save_model(folder / "two", "roberta", {0: "POSITIVE", 1: "NEGATIVE"}, 2)
    (folder / "rules.yaml").write_text(RULES)
    for name, shift in (("films", 0), ("people", 1)):
        lines = [{"text": text, "label": ["neg", "pos"][(i + shift) % 2]} for i, text in enumerate(TEXTS * 4)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipe(folder: Path, **settings: object) -> LabelRecipe:
    members = (
        LabelMemberRecipe("one", model="one"),
        LabelMemberRecipe("two", model="two", labels={"POSITIVE": "pos", "NEGATIVE": "neg"}),
        LabelMemberRecipe("rules", rules="rules.yaml"),
    )
    data = LabelData(validation={name: LabeledSource(f"{name}.jsonl") for name in ("films", "people")})
    given = {"members": members, "data": data, "format": "fp32", "weights": "fit", **settings}
    return LabelRecipe("text-classification", folder=folder, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(setting: Path) -> Path:
    export_label_bundle(recipe(setting), setting / "bundle")
    return setting / "bundle"


def test_a_mixture_of_tokenizers_label_names_and_rules(setting: Path, bundle: Path) -> None:
    import transformers

    manifest = read_any_manifest(bundle)
    assert manifest.labels == ("neg", "pos")
    assert set(manifest.weights.domains) == {"films", "people"}
    assert sum(manifest.weights.default.values()) == pytest.approx(1)
    with edgemix.load(bundle, provider="cpu") as classifier:
        for text in TEXTS:
            found = classifier.predict(text, weights={"one": 1, "two": 1, "rules": 1})
            own = {}
            for name, temperature in (
                ("one", manifest.members[0].temperature),
                ("two", manifest.members[1].temperature),
            ):
                model = transformers.AutoModelForSequenceClassification.from_pretrained(setting / name).eval()
                tokenizer = transformers.AutoTokenizer.from_pretrained(setting / name)
                with torch.no_grad():
                    logits = model(**tokenizer(text, return_tensors="pt")).logits[0] / temperature
                own[name] = torch.softmax(logits, -1).numpy()
            np.testing.assert_allclose(found.members["one"].probabilities["pos"], own["one"][1], atol=1e-4)
            np.testing.assert_allclose(found.members["two"].probabilities["pos"], own["two"][0], atol=1e-4)
            fired = "good" in text
            assert (found.members["rules"] is not None) == fired
            if not fired:
                mean = (own["one"][1] + own["two"][0]) / 2
                assert found.probabilities["pos"] == pytest.approx(mean, abs=1e-4)
        assert classifier.predict("good").members["rules"].probabilities["pos"] > 0.5
        assert classifier.predict("not good").members["rules"].probabilities["pos"] < 0.5


@pytest.mark.parametrize("weight_format", ["fp16", "int8", "int8-dynamic", "int4"])
def test_formats_stay_near(setting: Path, bundle: Path, tmp_path: Path, weight_format: str) -> None:
    members = (LabelMemberRecipe("one", model="one"),)
    manifest = export_label_bundle(
        recipe(setting, members=members, format=weight_format, weights="uniform"), tmp_path / "b", force=True
    )
    assert manifest.members[0].quantization.kl < {"int4": 0.3}.get(weight_format, 0.05)
    with edgemix.load(tmp_path / "b", provider="cpu") as it, edgemix.load(bundle, provider="cpu") as exact:
        for text in TEXTS:
            near, full = it.predict(text), exact.predict(text, weights={"one": 1})
            assert near.probabilities["pos"] == pytest.approx(full.probabilities["pos"], abs=0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ("good", "bad")}, "are none of the recipe's"),
        ({"members": (LabelMemberRecipe("one", model="one", labels={"X": "y"}),)}, "the model's labels are neg, pos"),
        ({"members": (LabelMemberRecipe("two", model="two"),)}, "none of the mixture's, which are POSITIVE, NEGATIVE"),
        (
            {"members": (LabelMemberRecipe("one", model="one"), LabelMemberRecipe("two", model="two"))},
            "have no label in common",
        ),
        ({"data": LabelData(), "format": "int8-dynamic", "weights": "uniform"}, "has no examples"),
        ({"max_length": 4000}, "read .* tokens"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(setting: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_label_bundle(recipe(setting, **settings), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_recipe_with_mistakes_is_refused(setting: Path, tmp_path: Path) -> None:
    members = (LabelMemberRecipe("one", model="./none"), LabelMemberRecipe("x"))
    with pytest.raises(RecipeError) as error:
        export_label_bundle(recipe(setting, members=members), tmp_path / "bundle")
    assert "there is no file or folder './none'" in str(error.value)
    assert "needs either a model or rules" in str(error.value)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Taggers and masked language models of two tokenizers, with examples."""
    folder = tmp_path_factory.mktemp("tagged")
    for kind, seed in (("bert", 1), ("roberta", 2)):
        tokenizer = hugging_face(kind)
        tags = {0: "O", 1: "B-PER", 2: "I-PER"}
        for head in ("TokenClassification", "MaskedLM"):
            settings = {"id2label": tags} if head == "TokenClassification" else {}
            model = tiny_encoder(kind, head, labels=3, seed=seed, vocab_size=len(tokenizer), **settings)
            model.save_pretrained(folder / f"{kind}-{head}")
            tokenizer.save_pretrained(folder / f"{kind}-{head}")
    rows = [{"tokens": ["Ada", "Lovelace", "lived"], "labels": ["B-PER", "I-PER", "O"]}] * 10
    (folder / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)))
    masks = [{"text": "The film was [MASK] good", "label": "the"}, {"text": "<mask> film", "label": "the"}] * 5
    (folder / "masks.jsonl").write_text("\n".join(map(json.dumps, masks)))
    return folder


@pytest.mark.parametrize("task", ["token-classification", "fill-mask"])
def test_taggers_and_masked_models_of_two_tokenizers_mix(tagged: Path, tmp_path: Path, task: str) -> None:
    head, file = {
        "token-classification": ("TokenClassification", "tags.jsonl"),
        "fill-mask": ("MaskedLM", "masks.jsonl"),
    }[task]
    members = tuple(LabelMemberRecipe(kind, model=f"{kind}-{head}") for kind in ("bert", "roberta"))
    data = LabelData(validation={"all": LabeledSource(file)})
    made = LabelRecipe(task, members, weights="fit", format="int8", data=data, folder=tagged)  # type: ignore[arg-type]
    manifest = export_label_bundle(made, tmp_path / "bundle", force=True)
    assert sum(manifest.weights.default.values()) == pytest.approx(1)
    with edgemix.load(tmp_path / "bundle", provider="cpu") as mixture:
        if task == "fill-mask":
            (place,) = mixture.predict("The film was [MASK] good", top=3)
            assert len(place.words) == 3
            assert mixture.predict("The film was <mask> good", top=3) == [place]
            with pytest.raises(InputError, match="no masked word"):
                mixture.predict("no mask")
        else:
            found = mixture.predict("Ada Lovelace lived in London")
            assert len(found.labels) == 5
            assert all(label in ("O", "B-PER", "I-PER") for label in found.labels)


def test_rules_abstain_on_words_without_a_name(tmp_path: Path) -> None:
    """A gazetteer beside a model: where it does not fire, the model decides alone."""
    (tmp_path / "rules.yaml").write_text("labels: [PER, LOC]\ngazetteers: [{label: PER, names: [Ada Lovelace]}]\n")
    recipe = LabelRecipe(
        "token-classification",
        (LabelMemberRecipe("names", rules="rules.yaml"),),
        labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
        folder=tmp_path,
    )
    export_label_bundle(recipe, tmp_path / "bundle")
    with edgemix.load(tmp_path / "bundle", provider="cpu") as tagger:
        scores, counts = tagger.score_texts(["Ada Lovelace met Bo"])
        assert counts == [4]
        assert scores[0].present.tolist() == [True, True, False, False]
        labels = tagger.predict("Ada Lovelace met Bo").labels
        assert labels[:2] == ("B-PER", "I-PER")
