import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from edgemix.errors import InputError
from edgemix.export.data.text import PIECE, calibration_windows, check_tokens, split, windows

EOS, BOS = 1, 2


def byte_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Every letter a..z is one token, from 3 on."""
    words = {"<unk>": 0, "<eos>": EOS, "<bos>": BOS} | {chr(97 + i): 3 + i for i in range(26)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>")


@pytest.fixture
def tokenizer():
    return byte_tokenizer(bos=False)


def test_documents_are_packed_with_the_end_of_text_token_between_them(tokenizer):
    assert windows(["abcd", "", "ef", "ghi"], tokenizer, 5) == [[3, 4, 5, 6, EOS], [7, 8, EOS, 9, 10]]


def test_every_window_begins_with_the_beginning_of_text_token_if_texts_do():
    assert windows(["abcd", "ef"], byte_tokenizer(bos=True), 4) == [[BOS, 3, 4, 5], [BOS, 6, EOS, 7]]


def test_little_text_makes_one_short_window(tokenizer):
    assert windows(["abc"], tokenizer, 100) == [[3, 4, 5, EOS]]
    assert windows(["abcdefgh"], tokenizer, 100, max_tokens=3) == [[3, 4, 5]]


def test_max_tokens_bounds_the_chunks_and_the_tokenized_text(tokenizer):
    assert len(windows(["abcde" * 100], tokenizer, 10, max_tokens=39)) == 3


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_text_is_an_error(tokenizer, documents):
    with pytest.raises(InputError, match="less than two tokens"):
        windows(documents, tokenizer, 8)


def test_the_seed_decides_the_order(tokenizer):
    documents = [chr(97 + i) * 7 for i in range(26)]
    first = windows(documents, tokenizer, 8, seed=1)
    assert first == windows(documents, tokenizer, 8, seed=1)
    assert first != windows(documents, tokenizer, 8, seed=2)
    assert sorted(first) == windows(documents, tokenizer, 8)


def test_long_documents_are_cut_at_line_ends_and_lose_nothing():
    document = "".join(f"line {i} {'abc' * 100}\n" for i in range(200))
    kept, held_out = split([document], 0.25)
    assert (len(kept), len(held_out)) == (3, 1)
    assert all(len(text) <= PIECE and text.endswith("\n") for text in kept + held_out)
    assert sorted("".join(kept + held_out)) == sorted(document)


def test_a_line_longer_than_a_piece_is_cut_inside():
    kept, held_out = split(["a" * PIECE + "b" * 5], 0.5)
    assert sorted(kept + held_out) == ["a" * PIECE, "b" * 5]


def test_what_is_held_out_depends_on_content_alone():
    documents = [f"document {i}" for i in range(40)]
    kept, held_out = split(documents, 0.2, seed=3)
    assert len(held_out) == 8
    assert not set(kept) & set(held_out)
    assert set(split(documents[::-1] + documents[:5], 0.2, seed=3)[1]) == set(held_out)
    assert set(split(documents, 0.2, seed=4)[1]) != set(held_out)


def test_one_piece_cannot_be_split():
    assert split(["short"], 0.5) == (["short"], [])


def test_calibration_takes_half_from_the_domain_of_the_members_name(tokenizer):
    domains = {name: [letter * 4_000] for name, letter in (("math", "a"), ("code", "b"), ("wiki", "c"))}
    found = calibration_windows(domains, tokenizer, 16, 40, name="wiki")
    assert [found.count([token] * 16) for token in (3, 4, 5)] == [10, 10, 20]
    assert calibration_windows(domains, tokenizer, 16, 40, name="wiki") == found


def test_calibration_makes_do_with_little_text(tokenizer):
    assert calibration_windows({"a": ["abc"], "b": ["d"]}, tokenizer, 64, 10) == [[3, 4, 5, EOS]]


def test_calibration_text_beyond_a_models_rows_is_refused_by_name(tokenizer):
    """An added token without a row failed within torch or ONNX Runtime, which name neither token nor member."""
    tokenizer.add_tokens(["<tool>"])
    found = calibration_windows({"a": ["abc<tool>d"]}, tokenizer, 8, 1)
    check_tokens(found, tokenizer, 30, "m")
    with pytest.raises(InputError, match=r"member m: .* token 29 \('<tool>'\), and the model has 29 rows"):
        check_tokens(found, tokenizer, 29, "m")
