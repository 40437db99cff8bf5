"""Encodings and entities against transformers' fast tokenizers and its pipeline."""

import itertools

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from helpers.label_tokenizers import HARD, hugging_face

from edgemix.runtime.classification.encoding import TextEncoder
from edgemix.runtime.classification.tokens.bio import LabelScheme
from edgemix.runtime.classification.tokens.spans import aggregate, merge_windows, subwords

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


LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")


@pytest.fixture(scope="module", params=["bert", "roberta", "albert"])
def ner(request):
    """A pipeline of a tiny random model, and its encoder."""
    theirs = hugging_face(request.param)
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.CONFIG_MAPPING[request.param](
        vocab_size=len(theirs), id2label=dict(enumerate(LABELS)), pad_token_id=theirs.pad_token_id, **options
    )
    torch.manual_seed(1)
    model = hf.AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    theirs.model_max_length = 60
    return hf.TokenClassificationPipeline(model=model, tokenizer=theirs), encoder(request.param, 60)


def labeled(pipeline, own, text, windows):
    """The tokens of a text and their distributions, as the runtime has them."""
    logits = []
    for window in windows:
        inputs = {"input_ids": window.ids[None], "attention_mask": np.ones_like(window.ids)[None]}
        with torch.no_grad():
            output = pipeline.model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        logits.append(output.logits[0].log_softmax(-1).numpy())
    tokens = merge_windows(windows, logits)
    return tokens, subwords(text, tokens, marked=own.marks_subwords, unknown_id=own.special_id("unk_token"))


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize(
    "text", ["Angela Merkel's met Babbage in New York, near", " Köln 東京 unbelievable\u200d U.N.", HARD[4]]
)
def test_entities_are_those_of_the_pipeline(ner, aggregation, text):
    pipeline, own = ner
    tokens, continues = labeled(pipeline, own, text, [own.encode(text)])
    ours = aggregate(
        text,
        tokens.log_probabilities,
        tokens.offsets,
        LabelScheme(LABELS),
        aggregation=aggregation,
        continues=continues,
    )
    theirs = pipeline(text, aggregation_strategy=aggregation)
    assert len(ours) == len(theirs) > 0
    for entity, expected in zip(ours, theirs, strict=True):
        assert entity.label == expected.get("entity_group", expected.get("entity"))
        assert (entity.start, entity.end) == (expected["start"], expected["end"])
        assert entity.text == text[expected["start"] : expected["end"]]
        assert entity.score == pytest.approx(float(expected["score"]), abs=1e-5)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", ["simple", "average"])
def test_entities_of_given_words_are_those_of_the_pipeline(ner, aggregation):
    pipeline, own = ner
    words = ["Angela", "Merkel's", "U.N.", "unbelievable", "in", "Köln"]
    text = " ".join(words)
    tokens, continues = labeled(pipeline, own, text, [own.encode(words)])
    ours = aggregate(
        text,
        tokens.log_probabilities,
        tokens.offsets,
        LabelScheme(LABELS),
        aggregation=aggregation,
        continues=continues,
    )
    [theirs] = pipeline([words], aggregation_strategy=aggregation, is_split_into_words=True)
    assert [(entity.label, entity.start, entity.end) for entity in ours] == [
        (entity["entity_group"], entity["start"], entity["end"]) for entity in theirs
    ]


@pytest.mark.parametrize("ner", ["bert"], indirect=True)
@pytest.mark.parametrize("aggregation", ["simple", "first"])
def test_the_text_of_an_entity_is_the_pipelines_word(ner, aggregation):
    """Where its decoder writes no spaces and letter case that the text does not have."""
    pipeline, own = ner
    text = "Angela Merkel met Babbage in New York near Merkel"
    tokens, continues = labeled(pipeline, own, text, [own.encode(text)])
    ours = aggregate(
        text,
        tokens.log_probabilities,
        tokens.offsets,
        LabelScheme(LABELS),
        aggregation=aggregation,
        continues=continues,
    )
    words = [entity["word"].removeprefix("##") for entity in pipeline(text, aggregation_strategy=aggregation)]
    assert [entity.text for entity in ours] == words


def test_a_short_text_in_windows_is_the_single_window(ner):
    pipeline, own = ner
    text = "Angela Merkel met Babbage"
    single, _ = labeled(pipeline, own, text, [own.encode(text)])
    windowed, _ = labeled(pipeline, own, text, own.windows(text, 20))
    assert np.array_equal(single.log_probabilities, windowed.log_probabilities)
    long, _ = labeled(pipeline, own, text * 20, own.windows(text * 20, 20))
    whole = TextEncoder(tokenizers.Tokenizer.from_str(pipeline.tokenizer.backend_tokenizer.to_str()), max_length=10_000)
    whole = whole.encode(text * 20)
    assert long.ids.tolist() == whole.ids[~whole.special].tolist()
    assert np.array_equal(long.offsets, whole.offsets[~whole.special])


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_padded_batch_is_read_as_each_text_alone(kind):
    """XLNet's head reads the last token of a row: padded on the right, it would read padding."""
    sizes = {"bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}}
    sizes["xlnet"] = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    torch.manual_seed(0)
    config = hf.CONFIG_MAPPING[kind](vocab_size=len(hugging_face(kind)), initializer_range=0.5, **sizes[kind])
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    own = encoder(kind, 40)
    texts = own.encode_batch(HARD)

    def logits(texts):
        batch = own.pad(texts)
        with torch.no_grad():
            return model(
                input_ids=torch.from_numpy(batch.ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                token_type_ids=torch.from_numpy(batch.type_ids),
            ).logits.numpy()

    assert np.allclose(logits(texts), np.concatenate([logits([text]) for text in texts]), atol=1e-5)
