import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgemix.errors import InputError
from edgemix.runtime.classification.encoding import TextEncoder
from edgemix.runtime.classification.fill_mask import (
    mask_places,
    shared_distribution,
    shared_vocabulary,
    top_strings,
    whole_words,
    with_own_mask,
)

WORDPIECE = ["[PAD]", "[UNK]", "[MASK]", "a", "The", "the", "##the", "film", "café", "##.", "Köln"]
BYTES = [
    "<mask>",
    "a",
    "Ġa",
    "the",
    "Ġthe",
    "Ġfilm",
    "Ġcaf",
    "ÃĤ",
    "ĠcafÃ©",
    "Ġ",
    "Ã",
    "ĠThe",
    "K",
    "Ġwasn",
    "Ġthe Ġthe",
]
METASPACE = ["<unk>", "<mask>", "▁", "▁a", "the", "▁the", "▁film", "Köln", "▁Köln"]


def ids(tokens):
    return {token: id_ for id_, token in enumerate(tokens)}


def encoder(core, mask, **options):
    core.add_special_tokens([mask])
    return TextEncoder(core, max_length=8, special_tokens={"mask_token": mask}, **options)


def wordpiece(tokens=WORDPIECE, **options):
    core = Tokenizer(models.WordPiece(ids(tokens), unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(["[PAD]", "[UNK]"])
    return encoder(core, "[MASK]", **options)


def byte_bpe():
    core = Tokenizer(models.BPE(ids(BYTES), []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return encoder(core, "<mask>")


def unigram():
    core = Tokenizer(models.Unigram([(token, -1.0) for token in METASPACE], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<unk>"])
    return encoder(core, "<mask>")


def test_whole_words_are_those_that_a_space_comes_before():
    assert list(whole_words(wordpiece())) == ["a", "The", "the", "film", "café", "Köln"]
    assert list(whole_words(byte_bpe())) == ["a", "the", "film", "caf", "café", "The", "wasn"]
    assert list(whole_words(unigram())) == ["a", "the", "film", "Köln"]
    assert list(whole_words(wordpiece(vocabulary=6))) == ["a", "The", "the"]


def test_members_of_one_vocabulary_mix_by_id():
    shared = shared_vocabulary([wordpiece(), wordpiece(vocabulary=10)])
    assert shared.whole
    assert [own.tolist() for own in shared.ids] == [list(range(10))] * 2
    assert shared.strings[7] == "film"


def test_members_of_different_vocabularies_mix_over_words_that_all_know():
    shared = shared_vocabulary([wordpiece(), byte_bpe(), unigram()])
    assert not shared.whole
    assert shared.strings == ("a", "the", "film")
    for own, tokens in zip(shared.ids, (WORDPIECE, BYTES, METASPACE), strict=True):
        assert [tokens[id_].strip("Ġ▁") for id_ in own] == list(shared.strings)
    # The other order of a vocabulary is another vocabulary, and the same words.
    assert set(shared_vocabulary([wordpiece(), wordpiece(WORDPIECE[::-1])]).strings) == set(whole_words(wordpiece()))


def test_vocabularies_without_a_common_word_are_refused():
    with pytest.raises(InputError, match="no whole word in common"):
        shared_vocabulary([wordpiece(["[UNK]", "[PAD]", "[MASK]", "xyz"]), unigram()])


@pytest.mark.filterwarnings("error")
def test_a_members_distribution_is_that_of_shared_words_given_that_it_is_one():
    with np.errstate(divide="ignore"):
        member = np.log(np.array([[0.5, 0.1, 0.3, 0.1], [1.0, 0.0, 0.0, 0.0]], np.float32))
    distribution, mass = shared_distribution(member, np.array([2, 1]))
    assert np.allclose(np.exp(distribution[0]), [0.75, 0.25])
    assert mass.tolist() == pytest.approx([0.4, 0.0])
    assert np.allclose(np.exp(distribution[1]), 0.5)  # it abstains
    shared = shared_vocabulary([wordpiece()])
    most = top_strings(np.log(np.arange(1, 12, dtype=np.float32) / 66), shared, 2)
    assert most == (("Köln", pytest.approx(11 / 66)), ("##.", pytest.approx(10 / 66)))


def test_masks_are_found_as_each_member_writes_them():
    text = "the [MASK] the <mask>"
    masks = ["[MASK]", "<mask>"]
    for own in (wordpiece(), byte_bpe(), unigram()):
        mask = own.special_tokens["mask_token"]
        own_text, count = with_own_mask(text, masks, mask)
        encoded = own.encode(own_text)
        places = mask_places(encoded, own, count)
        assert [encoded.tokens[place] for place in places] == [mask] * 2


def test_masks_that_are_missing_or_cut_off_are_refused():
    own = wordpiece()
    with pytest.raises(InputError, match="no masked word"):
        mask_places(own.encode("the film"), own, 0)
    with pytest.raises(InputError, match="of 2 masked words a member sees 1"):
        mask_places(own.encode("[MASK] " + "the " * 9 + "[MASK]"), own, 2)
    bare = TextEncoder(Tokenizer(models.WordPiece(ids(WORDPIECE), unk_token="[UNK]")), max_length=8)
    with pytest.raises(InputError, match="no mask token"):
        mask_places(bare.encode("the"), bare, 1)
