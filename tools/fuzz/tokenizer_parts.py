"""Tokenizers of each kind, and parts to put into them."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from values import TEXTS, dumps, integer, mutated_bytes, mutated_json, value

if TYPE_CHECKING:
    from random import Random

_PATTERNS = (
    "a",
    "",
    "(a+)+$",
    "(a|aa)+$",
    "(?=a)",
    "(?<=a)b",
    "\\p{L}+",
    ".",
    "(x+x+)+y",
    "[^\\r\\n]+",
    "(?i:'s)",
    "[",
    "(" * 500,
    "a{99999}",
    "((a{99}){99}){99}",
    "\\1",
    "(?R)",
    "(?:a?){40}a{40}",
)
_ALPHABET = [chr(code) for code in range(32, 127)]


def base(rng: Random, byte_level: bytes) -> bytes:
    """Return a sound tokenizer of some kind, of at most 258 ids."""
    tokenizer: dict[str, Any] = json.loads(byte_level)
    kind = rng.randrange(6)
    if kind == 1:
        tokenizer["model"] = {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {t: i for i, t in enumerate(["[UNK]", *_ALPHABET, "##a"])},
        }
        tokenizer["pre_tokenizer"], tokenizer["decoder"] = {"type": "BertPreTokenizer"}, None
    elif kind == 2:
        tokenizer["model"] = {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": False,
            "vocab": [["<unk>", 0.0], *([t, -i / 9] for i, t in enumerate(["▁", *_ALPHABET, "he", "llo"]))],
        }
        tokenizer["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        }
        tokenizer["decoder"] = tokenizer["pre_tokenizer"]
    elif kind == 3:
        tokenizer["model"] = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "hello": 1, "world": 2}}
        tokenizer["pre_tokenizer"], tokenizer["decoder"] = {"type": "Whitespace"}, None
    elif kind == 4:
        vocabulary = [*_ALPHABET, "he", "ll", "hell", "hello"]
        tokenizer["model"] |= {
            "vocab": {t: i for i, t in enumerate(vocabulary)},
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]],
            "byte_fallback": True,
        }
    if kind in (1, 2, 3, 4):
        count = len(tokenizer["model"]["vocab"])
        for number, token in enumerate(tokenizer["added_tokens"]):
            token["id"] = count + number
    return dumps(tokenizer)


def tokenizer(rng: Random, byte_level: bytes) -> bytes:
    """Return a tokenizer.json with hostile parts or values."""
    data = base(rng, byte_level)
    action = rng.randrange(10)
    if action == 0:
        return mutated_bytes(rng, data)
    if action < 5:
        return mutated_json(rng, data)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        _put_part(rng, document)
    data = dumps(document)
    return mutated_json(rng, data) if action == 9 else data


def _put_part(rng: Random, document: dict[str, Any]) -> None:
    place = rng.randrange(6)
    if place < 4:
        name, parts = (
            ("normalizer", _normalizer),
            ("pre_tokenizer", _pre_tokenizer),
            ("decoder", _decoder),
            ("post_processor", _post_processor),
        )[place]
        document[name] = _sequence(rng, parts, name)
    elif place == 4:
        flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
        token = {"id": integer(rng), "content": rng.choice(TEXTS)} | {flag: rng.random() < 0.5 for flag in flags}
        document["added_tokens"] += [token] * rng.choice((1, 2))
    else:
        document["model"][
            rng.choice(
                (
                    "dropout",
                    "unk_token",
                    "unk_id",
                    "continuing_subword_prefix",
                    "end_of_word_suffix",
                    "byte_fallback",
                    "ignore_merges",
                    "fuse_unk",
                    "max_input_chars_per_word",
                )
            )
        ] = value(rng)


def _sequence(rng: Random, part: Any, name: str) -> Any:
    key = {
        "normalizer": "normalizers",
        "pre_tokenizer": "pretokenizers",
        "decoder": "decoders",
        "post_processor": "processors",
    }[name]
    if rng.randrange(3):
        return part(rng)
    if rng.randrange(8) == 0:
        nested: Any = part(rng)
        for _ in range(rng.choice((10, 60, 130, 300))):
            nested = {"type": "Sequence", key: [nested]}
        return nested
    return {"type": "Sequence", key: [part(rng) for _ in range(rng.choice((0, 2, 30)))]}


def _pattern(rng: Random) -> dict[str, str]:
    return {rng.choice(("String", "Regex")): rng.choice(_PATTERNS)}


def _charsmap(rng: Random) -> str:
    size = rng.choice((0, 3, 4, 8, 1_024))
    units = bytes(rng.randrange(256) for _ in range(size))
    return base64.b64encode(rng.choice((size, 4, 0xFFFFFFFF, 1)).to_bytes(4, "little") + units + b"a\0bc\0").decode()


def _normalizer(rng: Random) -> dict[str, Any]:
    return rng.choice(
        (
            {
                "type": "Replace",
                "pattern": _pattern(rng),
                "content": rng.choice(("", "a", "aaaaaaaaaa", "\ud800", "b" * 9_999)),
            },
            {"type": "Prepend", "prepend": rng.choice(TEXTS)},
            {"type": "Append", "append": "a"},
            {"type": "NFD"},
            {"type": "NFKC"},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            {"type": "ByteLevel"},
            {"type": "Nmt"},
            {"type": "Precompiled", "precompiled_charsmap": _charsmap(rng)},
            {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
        )
    )


def _pre_tokenizer(rng: Random) -> dict[str, Any]:
    behavior = rng.choice(("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"))
    return rng.choice(
        (
            {"type": "Split", "pattern": _pattern(rng), "behavior": behavior, "invert": rng.random() < 0.5},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "Whitespace"},
            {"type": "Punctuation", "behavior": behavior},
            {"type": "Digits", "individual_digits": True},
            {"type": "CharDelimiterSplit", "delimiter": rng.choice(TEXTS)},
            {"type": "UnicodeScripts"},
            {
                "type": "Metaspace",
                "replacement": rng.choice(("▁", "a", "ab", "")),
                "prepend_scheme": rng.choice(("first", "never")),
            },
            {"type": "FixedLength", "length": integer(rng)},
            {"type": "WhitespaceSplit"},
        )
    )


def _decoder(rng: Random) -> dict[str, Any]:
    return rng.choice(
        (
            {"type": "Replace", "pattern": _pattern(rng), "content": rng.choice(TEXTS)},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": integer(rng), "stop": integer(rng)},
            {"type": "WordPiece", "prefix": "##", "cleanup": True},
            {"type": "BPEDecoder", "suffix": rng.choice(TEXTS)},
            {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
            {"type": "ByteLevel"},
        )
    )


def _post_processor(rng: Random) -> dict[str, Any]:
    token = rng.choice(("<s>", "<absent>", ""))
    special = {token: {"id": token, "ids": [integer(rng)] * rng.choice((0, 1, 9_999)), "tokens": [token]}}
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return rng.choice(
        (
            {
                "type": "TemplateProcessing",
                "single": single * rng.choice((1, 2, 99)),
                "pair": single,
                "special_tokens": special,
            },
            {
                "type": "RobertaProcessing",
                "sep": ["</s>", integer(rng)],
                "cls": ["<s>", integer(rng)],
                "trim_offsets": True,
                "add_prefix_space": True,
            },
            {"type": "BertProcessing", "sep": ["</s>", integer(rng)], "cls": ["<s>", integer(rng)]},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        )
    )
