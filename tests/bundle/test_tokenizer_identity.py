import json

import pytest

from edgemix.bundle.tokenizer_identity import TokenizerIdentity, first_difference
from edgemix.errors import InputError


def tokenizer(**changes):
    """A small BPE tokenizer.json with some parts replaced."""
    parsed = {
        "version": "1.0",
        "padding": None,
        "added_tokens": [{"id": 4, "content": "<end>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": ["a b"]},
    }
    model = parsed["model"] | changes.pop("model", {})
    return TokenizerIdentity.parse(json.dumps(parsed | {"model": model} | changes))


def test_bytes_and_decoder_play_no_part():
    same = tokenizer(
        version="2.0", decoder=None, padding={"length": 3}, model={"merges": [["a", "b"]], "unk_token": None}
    )
    assert same.sha256() == tokenizer().sha256()
    assert first_difference(tokenizer(), same) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"vocab": {"a": 1, "b": 0, "c": 2, "ab": 3}}}, "token 'a' is id 0 in one and id 1"),
        ({"model": {"vocab": {"a": 0, "b": 1, "ab": 3}}}, "token 'c' is id 2 in one and absent"),
        ({"model": {"merges": ["b a"]}}, "rule 0 is 'a b' in one and 'b a'"),
        ({"model": {"merges": []}}, "one has 1 merges, the other 0"),
        ({"model": {"type": "WordPiece"}}, "one is BPE, the other WordPiece"),
        ({"added_tokens": []}, "token '<end>' is id 4 in one and absent"),
    ],
)
def test_first_difference_is_named(changes, words):
    other = tokenizer(**changes)
    assert words in first_difference(tokenizer(), other)
    assert other.sha256() != tokenizer().sha256()


def test_pre_tokenizer_is_part_of_the_fingerprint():
    assert tokenizer(pre_tokenizer=None).sha256() != tokenizer().sha256()


def test_size_counts_added_tokens():
    assert tokenizer().size == 5


def test_unigram_scores_count():
    left = tokenizer(model={"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]})
    right = tokenizer(model={"type": "Unigram", "vocab": [["a", -1.0], ["b", -3.0]]})
    assert first_difference(left, right) is not None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": [1]}}', "\xff"]
)
def test_other_text_is_refused(text):
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        TokenizerIdentity.parse(text)
