"""Tiny tokenizers of the kinds that encoders have, trained on a few sentences."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SENTENCES = [
    "Angela Merkel met Barack Obama in New York, near the U.N.'s offices.",
    "The film wasn't good: a long-winded, sentimental mess!",
    "Grüße aus Köln — naïve café owners, 東京 and 北京.",
    "Ada Lovelace lived in London and worked with Charles Babbage.",
]
HARD = [
    "",
    " ",
    "a",
    "Angela  Merkel\tlives in\n\nNew York",
    " Grüße, 世界! 👩‍👩‍👧 naïve \ufffd cafe\u0301 end ",
    "unbelievable antidisestablishmentarianism xyzzy" * 3,
    "The film was not good, and the actors in London were." * 4,
]


def wordpiece_tokens() -> list[str]:
    """Tokens of a WordPiece vocabulary, cased; their place is their id."""
    letters = sorted(set("".join(SENTENCES)) - {" "})
    words = ["Angel", "##ela", "Me", "##rk", "New", "York", "Lon", "##don", "the", "The", "film", "Ada", "in", "##ing"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *letters, *(f"##{letter}" for letter in letters), *words]


@functools.cache
def byte_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@functools.cache
def pieces(*special: str) -> list[tuple[str, float]]:
    """Pieces of a Unigram vocabulary with their scores, special tokens first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKD()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=140, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    found = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return [*((token, 0.0) for token in special), *(piece for piece in found if piece[0] not in special)]


@functools.cache
def hugging_face(kind: str) -> Any:
    """A fast tokenizer of transformers: bert, roberta, roberta-untrimmed, xlnet, deberta-v2, albert, llama."""
    import transformers as hf

    if kind == "bert":
        tokens = wordpiece_tokens()
        return hf.BertTokenizer(vocab={token: id_ for id_, token in enumerate(tokens)}, do_lower_case=False)
    if kind.startswith("roberta"):
        vocab, merges = byte_bpe()
        return hf.RobertaTokenizer(vocab=vocab, merges=merges, trim_offsets=kind == "roberta", add_prefix_space=True)
    if kind == "xlnet":
        special = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
        return hf.XLNetTokenizer(vocab=pieces(*special), padding_side="left")
    if kind == "deberta-v2":
        return hf.DebertaV2Tokenizer(vocab=pieces("[PAD]", "<unk>", "[CLS]", "[SEP]", "[MASK]"), unk_token="<unk>")
    if kind == "albert":
        return hf.AlbertTokenizer(vocab=pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"))
    vocab, merges = byte_bpe()
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
