"""When two tokenizers are one: a fingerprint of what decides the token ids, and the first difference in words.

Works on the parsed `tokenizer.json` of the tokenizers library, so that the exporter, which compares members, and the
runtime, which checks a bundle, need nothing more. Byte layout, version fields, padding and truncation settings and
decoders play no part: they never change the ids of a text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from edgemix.errors import InputError
from edgemix.tokenizer_files.document import read_document

_MODEL_SETTINGS = (
    "byte_fallback",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "ignore_merges",
    "unk_token",
)
"""Settings of a BPE, WordPiece or Unigram model that change ids; empty and absent mean the same."""
_UNHASHED = ("fuse_unk", "max_input_chars_per_word", "unk_id")
"""Others, which the first bundles' fingerprints left out."""
_ONLY_UNKNOWN = ("unk_token", "fuse_unk")
"""Settings that count only where the vocabulary lacks something: byte-level vocabularies lack nothing."""
_FILLER = re.compile(r"\[PAD\d*\]")
"""Tokens that stand for padding rows of a model; no text is encoded to them."""


class TokenizerIdentity(msgspec.Struct, frozen=True):
    """What decides the token ids of a text, in canonical form.

    Attributes:
        kind: The model's algorithm: BPE, WordPiece, Unigram or WordLevel.
        vocabulary: Token -> id, added tokens included.
        merges: BPE's merge rules in order, each as "left right"; for Unigram each piece's score.
        added: Added token -> how it is matched (special, normalized, stripped, whole word).
        settings: The remaining settings: normalizer, pre-tokenizer and the model's own.
        unhashed: Settings of the model that are compared and are no part of the fingerprint.
    """

    kind: str
    vocabulary: dict[str, int]
    merges: tuple[str, ...]
    added: dict[str, str]
    settings: dict[str, Any]
    unhashed: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of token ids, gaps included: one more than the greatest id."""
        return max(self.vocabulary.values(), default=-1) + 1

    @property
    def trained_size(self) -> int:
        """Number of token ids without the added tokens that come after all others."""
        own = (number for token, number in self.vocabulary.items() if token not in self.added)
        return max(own, default=-1) + 1

    def sha256(self) -> str:
        """Hexadecimal digest over all attributes but `unhashed`."""
        hashed = msgspec.structs.asdict(self)
        del hashed["unhashed"]
        return hashlib.sha256(msgspec.json.encode(hashed, order="sorted")).hexdigest()

    @classmethod
    def parse(cls, text: str | bytes) -> TokenizerIdentity:
        """Read a `tokenizer.json`.

        Raises:
            InputError: It is not JSON or not a tokenizer that the tokenizers library writes.
        """
        parsed = read_document(text)
        try:
            model = parsed["model"]
            listed = model["vocab"]
            scores: list[str] = []
            if isinstance(listed, Mapping):
                vocabulary = {str(token): int(number) for token, number in listed.items()}
            else:  # Unigram: [piece, score] pairs, the id is the place
                vocabulary = {str(piece): place for place, (piece, _) in enumerate(listed)}
                scores = [f"{piece} {score!r}" for piece, score in listed]
            merges = [m if isinstance(m, str) else f"{m[0]} {m[1]}" for m in model.get("merges") or ()]
            added = {}
            for token in parsed.get("added_tokens") or ():
                vocabulary[str(token["content"])] = int(token["id"])
                flags = [f for f in ("special", "normalized", "lstrip", "rstrip", "single_word") if token.get(f)]
                added[str(token["content"])] = " ".join(flags)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(
                f"not a tokenizer.json: {type(error).__name__} {error}",
                "Export the tokenizer with the tokenizers library (a fast tokenizer of transformers).",
            ) from None
        settings = {name: model[name] for name in _MODEL_SETTINGS if model.get(name)}
        for part in ("normalizer", "pre_tokenizer"):
            if parsed.get(part):
                settings[part] = parsed[part]
        unhashed = {name: model[name] for name in _UNHASHED if model.get(name)}
        return cls(str(model.get("type", "BPE")), vocabulary, tuple(scores or merges), added, settings, unhashed)


def first_difference(a: TokenizerIdentity, b: TokenizerIdentity) -> str | None:
    """The first thing that gives one text different ids, in words ("a" and "b" stand for the two); None if none.

    Tokens such as `[PAD]` that only one has are padding of its model's rows, and do not count. Settings that two
    descriptions may put in different ways are left to a comparison of encoded text: see `may_differ`.
    """
    if a.kind != b.kind:
        return f"one is {a.kind}, the other {b.kind}"
    filler = {token for token in a.vocabulary.keys() ^ b.vocabulary.keys() if _FILLER.fullmatch(token)}
    for token in sorted((a.vocabulary.keys() | b.vocabulary.keys()) - filler, key=lambda t: _place(t, a, b)):
        left, right = a.vocabulary.get(token), b.vocabulary.get(token)
        if left != right:
            return f"token {token!r} is {_number(left)} in one and {_number(right)} in the other"
    return _difference_of_rules(a, b, filler) or _difference_of_settings(a, b)


def may_differ(a: TokenizerIdentity, b: TokenizerIdentity) -> bool:
    """Whether two tokenizers without a `first_difference` are described differently, and so may encode differently."""
    return (a.settings, a.unhashed) != (b.settings, b.unhashed)


def _difference_of_rules(a: TokenizerIdentity, b: TokenizerIdentity, filler: set[str]) -> str | None:
    """The first difference of merges (pieces' scores) and of added tokens."""
    left_rules, right_rules = (_rules(identity, filler) for identity in (a, b))
    if left_rules != right_rules:
        for place, (left_rule, right_rule) in enumerate(zip(left_rules, right_rules, strict=False)):
            if left_rule != right_rule:
                return f"rule {place} is {left_rule!r} in one and {right_rule!r} in the other"
        return f"one has {len(left_rules)} merges, the other {len(right_rules)}"
    for token in sorted((a.added.keys() | b.added.keys()) - filler):
        if (token in a.added) != (token in b.added):
            return f"{token!r} is an added token of one only"
        if a.added[token] != b.added[token]:
            left, right = (identity.added[token] or "plain" for identity in (a, b))
            return f"the added token {token!r} is {left} in one and {right} in the other"
    return None


def _difference_of_settings(a: TokenizerIdentity, b: TokenizerIdentity) -> str | None:
    """The first difference of settings that mean what they say."""
    left_settings, right_settings = a.settings | a.unhashed, b.settings | b.unhashed
    for name in (*_MODEL_SETTINGS, *_UNHASHED):
        left, right = left_settings.get(name), right_settings.get(name)
        if left != right and name not in _ONLY_UNKNOWN:
            return f"{name} is {left!r} in one and {right!r} in the other"
    return None


def _rules(identity: TokenizerIdentity, filler: set[str]) -> tuple[str, ...]:
    if identity.kind != "Unigram" or not filler:
        return identity.merges
    return tuple(rule for rule in identity.merges if rule.rpartition(" ")[0] not in filler)


def _place(token: str, a: TokenizerIdentity, b: TokenizerIdentity) -> tuple[int, str]:
    return min(identity.vocabulary.get(token, 1 << 62) for identity in (a, b)), token


def _number(value: int | None) -> str:
    return "absent" if value is None else f"id {value}"
