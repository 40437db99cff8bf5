"""Mixtures of classifiers against closed forms."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from helpers.label_members import LabelBundle, random_classifier

import edgemix
from edgemix.bundle.manifest import MANIFEST, checksum_of
from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.runtime import Mixture
from edgemix.runtime.classification.classifier import Classifier

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["a good film", "x", "", "Grüße!" * 40, "bad", "no", "a" * 10_000, "The end."]
GENERATOR = np.random.default_rng(0)
MANY = ["".join(map(chr, GENERATOR.integers(33, 126, GENERATOR.integers(1, 60)))) for _ in range(400)]


@pytest.fixture
def three(tmp_path: Path) -> Classifier:
    """Three members: one does not know every label, one has another temperature."""
    members = {
        "one": random_classifier(1, "abc", cost=3.0),
        "two": random_classifier(2, "cab", temperature=2.5, cost=1.0, max_length=16),
        "three": random_classifier(3, "ba", cost=2.0),
    }
    weights = {"one": 0.5, "two": 0.2, "three": 0.3}
    domains = {"films": {"one": 1.0, "two": 0.0, "three": 0.0}}
    return Classifier.load(LabelBundle(members, weights=weights, domains=domains).write(tmp_path / "bundle"), "cpu")


def expected(classifier: Classifier, text: str, weights: dict[str, float]) -> dict[str, float]:
    forms = {
        "one": random_classifier(1, "abc"),
        "two": random_classifier(2, "cab", temperature=2.5, max_length=16),
        "three": random_classifier(3, "ba"),
    }
    own = {name: form.probabilities(text or "\0") for name, form in forms.items()}
    return {
        label: sum(weight * own[name].get(label, 0.0) for name, weight in weights.items())
        for label in classifier.labels
    }


def test_the_mixture_is_the_weighted_mean_whatever_the_batch(three):
    together = three.predict_batch(TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        alone = three.predict(text)
        assert alone.label == found.label
        np.testing.assert_allclose(list(alone.probabilities.values()), list(found.probabilities.values()), rtol=1e-5)
        assert sum(found.probabilities.values()) == pytest.approx(1)
        if text:
            exact = expected(three, text, dict(three.weights))
            assert found.probabilities == pytest.approx(exact, rel=1e-4)
            assert found.label == max(exact, key=exact.__getitem__)


def test_weights_and_ways_to_mix(three):
    text = TEXTS[0]
    alone = three.predict(text, weights="films")
    assert alone.probabilities == pytest.approx(expected(three, text, {"one": 1.0}), rel=1e-4)
    assert list(alone.members) == ["one"]
    even = three.predict(text, weights={"one": 3, "three": 1})
    assert even.probabilities == pytest.approx(expected(three, text, {"one": 0.75, "three": 0.25}), rel=1e-4)
    for how in ("log-linear", "bayes"):
        found = three.predict(text, combine=how)
        assert sum(found.probabilities.values()) == pytest.approx(1)
        assert found.probabilities["c"] > 0  # one that does not know a label cannot veto it
    for options in ({"weights": "x"}, {"weights": {"x": 1}}, {"combine": "x"}, {"weights": {"one": -1}}):
        with pytest.raises(InputError):
            three.predict(text, **options)


def test_each_members_share_is_told(three):
    found = three.predict(TEXTS[0])
    assert sum(each.share for each in found.members.values()) == pytest.approx(1)
    assert {name: each.weight for name, each in found.members.items()} == pytest.approx(dict(three.weights))
    assert found.members["three"].probabilities.keys() == {"a", "b"}


@pytest.mark.parametrize("combine", ["linear", "log-linear", "bayes"])
def test_decisions_are_the_full_mixtures(three, combine):
    full = three.predict_batch(MANY, combine=combine)
    decided = three.predict_batch(MANY, combine=combine, decision=True)
    assert [each.labels for each in decided] == [each.labels for each in full]


def test_decisions_ask_expensive_members_less(tmp_path):
    members = {"cheap": random_classifier(1, "ab", cost=0.1), "dear": random_classifier(2, "ab", cost=9.0)}
    with Classifier.load(LabelBundle(members, weights={"cheap": 0.8, "dear": 0.2}).write(tmp_path / "b"), "cpu") as it:
        asked = []
        dear = it.models[1]
        score = dear.score
        dear.score = lambda texts, pairs=None: asked.extend(texts) or score(texts, pairs)
        full = it.predict_batch(MANY)
        asked.clear()
        decided = it.predict_batch(MANY, decision=True)
    assert [each.label for each in decided] == [each.label for each in full]
    assert 0 < len(asked) < len(MANY) / 2


@pytest.mark.parametrize("combine", ["linear", "log-linear", "bayes"])
def test_several_labels_are_questions_of_their_own(tmp_path, combine):
    members = {"one": random_classifier(1, "ab"), "two": random_classifier(2, "bc")}
    settings = {"multi_label": True, "prior": (0.5, 0.5, 0.5)}
    with Classifier.load(LabelBundle(members, settings=settings).write(tmp_path / "b"), "cpu") as it:
        text = TEXTS[0]
        found = it.predict(text, combine=combine)
        yes = {
            name: dict(zip(form.labels, 1 / (1 + np.exp(-form.logits(text).astype(float))), strict=True))
            for name, form in members.items()
        }
        assert found.probabilities["a"] == pytest.approx(yes["one"]["a"], rel=1e-4)
        assert found.probabilities["c"] == pytest.approx(yes["two"]["c"], rel=1e-4)
        if combine == "linear":
            assert found.probabilities["b"] == pytest.approx((yes["one"]["b"] + yes["two"]["b"]) / 2, rel=1e-4)
        chosen = {label for label, probability in found.probabilities.items() if probability > 0.5}
        assert set(found.labels) == chosen
        full, decided = it.predict_batch(MANY, combine=combine), it.predict_batch(MANY, combine=combine, decision=True)
        assert [set(each.labels) for each in decided] == [set(each.labels) for each in full]


def test_asyncio_and_closing(three):
    found = asyncio.run(three.apredict_batch(TEXTS[:2]))
    assert [each.label for each in found] == [each.label for each in three.predict_batch(TEXTS[:2])]
    assert asyncio.run(three.apredict("x")).label == three.predict("x").label
    three.close()
    with pytest.raises(EdgemixError, match="closed"):
        three.predict("x")


@pytest.mark.parametrize("texts", ["text", ["\ud800"], [3], [None], ["a", ["b"]]])
def test_what_is_no_text_is_refused(three, texts):
    with pytest.raises(InputError):
        three.predict_batch(texts)
    with pytest.raises(InputError, match="second texts"):
        three.predict_batch(["a", "b"], ["c"])


def test_a_bundle_opens_as_the_class_of_its_task_and_no_other(tmp_path):
    folder = LabelBundle({"one": random_classifier(1)}).write(tmp_path / "bundle")
    assert type(edgemix.load(folder, provider="cpu")) is Classifier
    with pytest.raises(BundleError, match="is a bundle of text-classification"):
        Mixture.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it["members"][0].update(labels=["a", "b"]), "3 logits for 2 labels"),
        (lambda it: it["members"][0].update(labels=["a", "b", "z"]), "its labels are not the mixture's"),
        (lambda it: it["members"][0].update(temperature=0), "temperature is 0"),
        (lambda it: it["members"][0].update(graph="../x.onnx"), "is not in the folder"),
        (lambda it: it["members"][0].update(kind="model"), "is damaged"),
        (lambda it: it["members"][0]["tokenizer"].update(max_length=1 << 40), "max_length is"),
        (lambda it: it.update(labels=["a", "a", "b", "c"]), "there twice"),
        (lambda it: it.update(prior=[0.5, 0.5]), "prior"),
        (lambda it: it.update(task="image-classification"), "names the task 'image-classification'"),
        (lambda it: it.update(task="fill-mask"), "fill-mask has none"),
        (lambda it: it.update(schema=4), "schema is 4"),
        (lambda it: it["weights"]["default"].update(one=0.5), "does not sum to 1"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path, change, message):
    folder = LabelBundle({"one": random_classifier(1)}).write(tmp_path / "bundle")
    document = msgspec.json.decode((folder / MANIFEST).read_bytes())
    change(document)
    document["checksum"] = checksum_of(document)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(document))
    with pytest.raises(BundleError, match=message):
        edgemix.load(folder, provider="cpu")


def test_feedback_moves_weights_to_the_member_that_is_right(tmp_path):
    members = {"one": random_classifier(1, "ab"), "two": random_classifier(2, "ab")}
    settings = {"counts": {"one": 5.0, "two": 5.0}}
    folder = LabelBundle(members, settings=settings).write(tmp_path / "bundle")
    with Classifier.load(folder, "cpu") as classifier:
        right = [max(own := members["two"].probabilities(text), key=own.__getitem__) for text in MANY]
        before = (folder / MANIFEST).read_bytes()
        dry = classifier.feedback(MANY, right, dry_run=True)
        assert dict(classifier.weights) == {"one": 0.5, "two": 0.5}
        found = classifier.feedback(MANY, right)
        assert found == dry
        assert found.after["two"] > 0.9
        assert found.right_after > found.right
        assert (folder / MANIFEST).read_bytes() == before
        classifier.save(folder)
        assert dict(classifier.weights) == found.after
    with Classifier.load(folder, "cpu") as again:
        assert again.weights == found.after
        assert sum(again.manifest.counts.values()) == pytest.approx(10 + len(MANY))
        for texts, labels in ((["a"], ["z"]), (["a"], []), ([], [])):
            with pytest.raises(InputError):
                again.feedback(texts, labels)


def test_an_explanation_names_the_words_that_decide(tmp_path):
    table = np.zeros((258, 2), np.float32)
    table[ord("!"), 1] = 40.0
    with Classifier.load(
        LabelBundle({"one": dataclasses.replace(random_classifier(1, "ab"), table=table)}).write(tmp_path / "b"), "cpu"
    ) as classifier:
        found = classifier.explain("well ! done")
        assert found.prediction.label == "b"
        assert max(found.words, key=lambda word: word.effect).text == "!"
        assert [found.prediction.label] * 3 == ["b"] * len(found.words)
        assert classifier.explain("").words == ()
        assert len(classifier.explain("word " * 5000).words) == 128
