import json

import pytest
from helpers.onnx_members import byte_tokenizer

from edgemix.bundle.tokenizer_identity import TokenizerIdentity, first_difference, may_differ
from edgemix.errors import InputError

END = {"id": 4, "content": "<end>", "special": True}


def tokenizer(**changes):
    """A small BPE tokenizer.json with some parts replaced."""
    parsed = {
        "version": "1.0",
        "padding": None,
        "added_tokens": [END],
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
        ({"model": {"ignore_merges": True}}, "ignore_merges is None in one and True in the other"),
        ({"model": {"byte_fallback": True}}, "byte_fallback is None"),
        ({"added_tokens": [END | {"lstrip": True}]}, "added token '<end>' is special in one and special lstrip in"),
        ({"added_tokens": [END | {"special": False}]}, "added token '<end>' is special in one and plain in"),
        ({"added_tokens": [END, {"id": 5, "content": "<pad>"}]}, "token '<pad>' is absent in one and id 5"),
    ],
)
def test_first_difference_is_named(changes, words):
    other = tokenizer(**changes)
    assert words in first_difference(tokenizer(), other)
    assert other.sha256() != tokenizer().sha256()


def test_pre_tokenizer_is_part_of_the_fingerprint():
    assert tokenizer(pre_tokenizer=None).sha256() != tokenizer().sha256()


@pytest.mark.parametrize("name", ["[PAD]", "[PAD5]"])
def test_rows_that_only_fill_a_model_up_are_no_difference(name):
    """Fine-tunes with such rows were refused beside their base (llama.cpp 4331)."""
    padded = tokenizer(added_tokens=[END, {"id": 5, "content": name, "special": True}])
    assert first_difference(padded, tokenizer()) is None
    assert first_difference(tokenizer(), padded) is None
    moved = tokenizer(added_tokens=[END, {"id": 6, "content": name, "special": True}])
    assert "is id 5 in one and id 6" in first_difference(padded, moved)


def test_parts_that_are_written_differently_may_differ():
    other = tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]})
    assert first_difference(tokenizer(), other) is None
    assert may_differ(tokenizer(), other)
    assert not may_differ(tokenizer(), tokenizer(version="2.0"))
    assert may_differ(tokenizer(), tokenizer(model={"fuse_unk": True}))


def test_fingerprints_of_exported_bundles_stay():
    assert tokenizer(model={"fuse_unk": True}).sha256() == tokenizer().sha256()
    known = "6613b10534f5f66889ad477bae496757ebbd4e91113cf466f7017e100d4bd31f"
    assert TokenizerIdentity.parse(byte_tokenizer().to_str()).sha256() == known


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
