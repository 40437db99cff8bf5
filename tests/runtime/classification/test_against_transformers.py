"""Encodings and entities against transformers' fast tokenizers and its pipeline."""

import itertools

import numpy as np
import pytest
import tokenizers
from helpers.label_tokenizers import HARD, hugging_face

from edgemix.runtime.classification.encoding import TextEncoder

KINDS = ["bert", "roberta", "roberta-untrimmed", "xlnet", "deberta-v2", "albert"]


def encoder(kind, max_length=12):
    theirs = hugging_face(kind)
    return TextEncoder(
        tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str()),
        max_length=max_length,
        special_tokens={name: text for name, text in theirs.special_tokens_map.items() if isinstance(text, str)},
        pad_type_id=theirs.pad_token_type_id,
        padding_side=theirs.padding_side,
    )


def expected(kind, *texts, max_length=12, **options):
    return hugging_face(kind)(
        *texts,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_token_type_ids=True,
        **options,
    )


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs["input_ids"])
    for row, text in enumerate(ours):
        assert text.ids.tolist() == theirs["input_ids"][row]
        assert text.type_ids.tolist() == theirs["token_type_ids"][row]
        assert text.special.tolist() == [bool(special) for special in theirs["special_tokens_mask"][row]]
        assert [-1 if word is None else word for word in theirs.word_ids(row)] == text.words.tolist()
        assert [-1 if text is None else text for text in theirs.sequence_ids(row)] == text.sequences.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [6, 17, 40])
def test_texts_and_pairs_are_encoded_as_transformers_does(kind, max_length):
    texts, theirs = encoder(kind, max_length).encode_batch(HARD), expected(kind, HARD, max_length=max_length)
    assert_equal(texts, theirs)
    assert [[tuple(pair) for pair in text.offsets.tolist()] for text in texts] == theirs["offset_mapping"]
    firsts, seconds = zip(*itertools.product(HARD, HARD), strict=True)
    texts = encoder(kind, max_length).encode_batch(firsts, seconds)
    theirs = expected(kind, list(firsts), list(seconds), max_length=max_length)
    assert_equal(texts, theirs)
    assert [[tuple(pair) for pair in text.offsets.tolist()] for text in texts] == theirs["offset_mapping"]


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_encoded_as_transformers_does_and_their_offsets_count_in_the_text(kind):
    words = [["Angela", "Merkel's", "", "U.N.", "naïve", "unbelievable"], [], ["a"] * 30]
    texts, theirs = encoder(kind).encode_batch(words), expected(kind, words, is_split_into_words=True)
    assert_equal(texts, theirs)
    for row, (given, text) in enumerate(zip(words, texts, strict=True)):
        whole = " ".join(given)
        for (start, end), (own_start, own_end), word in zip(
            text.offsets.tolist(), theirs["offset_mapping"][row], text.words.tolist(), strict=True
        ):
            if word >= 0:
                assert whole[start:end] == given[word][own_start:own_end]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [0, 4])
def test_windows_are_those_of_transformers(kind, stride):
    for text in HARD:
        windows = encoder(kind).windows(text, stride)
        theirs = expected(kind, text, stride=stride, return_overflowing_tokens=True)
        assert_equal(windows, theirs)
        assert [[tuple(pair) for pair in window.offsets.tolist()] for window in windows] == theirs["offset_mapping"]
        whole = encoder(kind, 10_000).encode(text)
        tokens = whole.ids[~whole.special]
        for window in windows:
            own = window.ids[~window.special]
            assert own.tolist() == tokens[window.first : window.first + len(own)].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_padded_as_transformers_does(kind):
    own = encoder(kind)
    batch, theirs = own.pad(own.encode_batch(HARD)), expected(kind, HARD, padding=True)
    assert np.array_equal(batch.ids, theirs["input_ids"])
    assert np.array_equal(batch.attention_mask, theirs["attention_mask"])
    assert np.array_equal(batch.type_ids, theirs["token_type_ids"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    ["The film was not good, said Ada. " * 100, "x" * 3_000, " " * 3_000 + "Ada " * 20, "東京" * 1_000],
    ids=["sentences", "one word", "spaces", "no spaces"],
)
def test_a_beginning_of_a_long_text_is_encoded_as_the_whole(kind, text):
    """A part's last token may be another than in the whole text: only tokens far from the cut count."""
    odd = 97 + hugging_face(kind).num_special_tokens_to_add(pair=True)
    for pair in (None, "Ada", text + "Ada"):
        ours = encoder(kind, odd).encode(text, pair)
        theirs = expected(kind, [text], *([] if pair is None else [[pair]]), max_length=odd)
        assert_equal([ours], theirs)
