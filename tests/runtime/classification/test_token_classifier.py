"""Mixtures of taggers against closed forms."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from helpers.label_members import LabelBundle, random_classifier

import edgemix
from edgemix.errors import InputError

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXTS = ["Ada met Bo in York.", "a", "", "word " * 3000, "Grüße aus Köln!"]


@pytest.fixture
def pair(tmp_path):
    """Two members; the second does not know places, and reads 32 bytes at once."""
    members = {
        "one": random_classifier(1, LABELS, by_token=True, max_length=64),
        "two": random_classifier(2, LABELS[:3], by_token=True, max_length=32, temperature=2.0),
    }
    weights = {"one": 0.75, "two": 0.25}
    folder = LabelBundle(members, weights=weights, task="token-classification").write(tmp_path / "bundle")
    return edgemix.load(folder, provider="cpu")


def expected(text, start):
    """The mixture's distribution at the word that begins at a character: that of the word's first byte."""
    byte = text[start].encode()[0]
    found = {}
    for name, form in (("one", random_classifier(1, LABELS)), ("two", random_classifier(2, LABELS[:3]))):
        scores = np.exp(form.table[byte].astype(float) / (2.0 if name == "two" else 1.0))
        found[name] = dict(zip(form.labels, scores / scores.sum(), strict=True))
    return {label: 0.75 * found["one"][label] + 0.25 * found["two"].get(label, 0.0) for label in LABELS}


def test_words_have_the_mixtures_labels_whatever_the_batch_and_the_length(pair):
    together = pair.predict_batch(TEXTS, aggregation="simple")
    for text, found in zip(TEXTS, together, strict=True):
        assert pair.predict(text, aggregation="simple") == found
        assert len(found.words) == len(found.labels) == len(found.probabilities)
        for (start, _), label, probability in zip(found.words[:40], found.labels, found.probabilities, strict=False):
            exact = expected(text, start)
            assert label == max(exact, key=exact.__getitem__)
            assert probability == pytest.approx(exact[label], rel=1e-4)
    assert together[2].entities == ()
    assert len(together[3].words) == 3000


def test_entities_are_consistent_and_stand_in_the_text(pair):
    for text in TEXTS:
        found = pair.predict(text)
        before = "O"
        for label in found.labels:
            assert not label.startswith("I-") or before[2:] == label[2:]
            before = label
        for entity in found.entities:
            assert text[entity.start : entity.end] == entity.text
            assert entity.label in ("PER", "LOC")


def test_words_can_be_given(pair):
    words = ["Ada", "met", "Bo"]
    found = pair.predict(words)
    assert [(" ".join(words))[start:end] for start, end in found.words] == words
    assert asyncio.run(pair.apredict(words)) == found
    assert asyncio.run(pair.apredict_batch([words, "x"]))[0] == found


@pytest.mark.parametrize("options", [{"aggregation": "x"}, {"combine": "x"}, {"weights": "x"}])
def test_options_out_of_bounds_are_refused(pair, options):
    with pytest.raises(InputError):
        pair.predict("a", **options)
    with pytest.raises(InputError):
        pair.predict_batch("a")
    with pytest.raises(InputError, match="at most 1,048,576"):
        pair.predict("word " * 1_000_000)
