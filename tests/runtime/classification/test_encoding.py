import time

import numpy as np
import pytest
from helpers.label_tokenizers import byte_bpe, wordpiece_tokens
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgemix.errors import BundleError, InputError
from edgemix.runtime.classification.batching import length_batches
from edgemix.runtime.classification.encoding import TextEncoder

SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}


def core():
    ids = {token: id_ for id_, token in enumerate(wordpiece_tokens())}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return core


def encoder(**options):
    return TextEncoder(core(), **{"max_length": 16, "special_tokens": SPECIAL, **options})


def bare_bytes(**options):
    """As GPT-2's and Qwen's: no special tokens around a text."""
    vocab, merges = byte_bpe()
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return TextEncoder(core, max_length=16, **options)


def test_an_encoder_is_read_from_a_bundles_file(tmp_path):
    file = tmp_path / "tokenizer.json"
    saved = core()
    saved.enable_truncation(3)
    saved.save(str(file))
    loaded = TextEncoder.load(file, max_length=16, special_tokens=SPECIAL)
    assert loaded.encode("Ada met Barack").ids.tolist() == encoder().encode("Ada met Barack").ids.tolist()
    file.write_text("{}")
    with pytest.raises(BundleError, match="cannot be read"):
        TextEncoder.load(file, max_length=16)


@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_text_is_its_special_tokens(empty):
    assert encoder().encode(empty).tokens == ["[CLS]", "[SEP]"]
    assert [window.tokens for window in encoder().windows(empty, 2)] == [["[CLS]", "[SEP]"]]


def test_an_empty_text_without_a_template_is_one_special_token_or_refused():
    """A graph cannot run on a text of no tokens."""
    [text] = bare_bytes(special_tokens={"eos_token": "</s>"}).encode_batch([""])
    assert text.tokens == ["</s>"]
    assert text.special.tolist() == [True]
    with pytest.raises(InputError, match="the text is empty"):
        bare_bytes().encode("")


@pytest.mark.parametrize(
    "texts",
    [["a\ud800b"], [["a", "\ud800"]], [7], [[7]], [None], ["a", ["b"]]],
    ids=["surrogate", "surrogate in a word", "number", "number as a word", "none", "mixed"],
)
def test_what_is_no_text_is_refused(texts):
    with pytest.raises(InputError, match=r"Unicode|text"):
        encoder().encode_batch(texts)


def test_tokens_without_a_row_are_refused():
    encoder(vocabulary=1_000).encode("Ada")
    with pytest.raises(InputError, match="no row for"):
        encoder(vocabulary=4).encode("Ada")


def test_a_window_must_hold_a_token_of_a_pair():
    with pytest.raises(BundleError, match="max_length"):
        encoder(max_length=3)


@pytest.mark.parametrize("stride", [-1, 8])
def test_a_stride_that_makes_windows_without_number_is_refused(stride):
    with pytest.raises(InputError, match="stride"):
        encoder().windows("Ada", stride)


def test_a_pair_of_long_texts_takes_time_in_proportion():
    """A window of each with each of the other's are too many: tokenizers' own truncation makes them."""
    text = "Ada met Barack in London. " * 4_000
    started = time.process_time()
    assert len(encoder().encode(text, text)) == 16
    assert len(encoder().encode(text)) == 16
    assert len(encoder().encode(text.split())) == 16
    assert time.process_time() - started < 5


def test_batches_hold_each_text_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 513, 1_000)
    batches = length_batches(lengths, 4_096)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1_000))
    for batch in batches:
        total = len(batch) * lengths[batch].max()
        assert total <= 4_096
        assert total - lengths[batch].sum() <= max(64, total / 4)
    assert [batch.tolist() for batch in length_batches([3, 500, 4, 5], 600)] == [[1], [3, 2, 0]]
    assert [batch.tolist() for batch in length_batches([9, 9, 9], 5)] == [[0], [1], [2]]
    assert length_batches([], 5) == []


def test_texts_of_batches_keep_their_places():
    own = encoder()
    texts = own.encode_batch(["Ada", "Ada met Barack in London", "", "Ada met"])
    for places, batch in own.batches(texts, 10):
        for place, ids, mask in zip(places, batch.ids, batch.attention_mask, strict=True):
            assert ids[mask == 1].tolist() == texts[place].ids.tolist()
