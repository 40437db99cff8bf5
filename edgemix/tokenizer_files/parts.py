"""The parts of a tokenizer that edgemix knows, and the bounds of what each may do to a text.

Every part says by how much it can lengthen a text: the product over a sequence is bounded, as twenty parts that each
replace "a" by "aa" make a million characters of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edgemix.tokenizer_files.charsmap import longest_replacement
from edgemix.tokenizer_files.pattern import check_pattern

MAX_GROWTH = 4_096
"""Most bytes that all normalizers, or all pre-tokenizers, or all decoders, may make of one byte."""
MAX_PARTS = 256
"""Most parts of a sequence, those of sequences in it included."""
MAX_DEPTH = 8
"""Most sequences inside one another."""
MAX_AFFIX = 256
"""Most characters of a text that a part adds or replaces by."""
MAX_SPECIAL = 64
"""Most pieces of a post-processor's template, and ids of one of its special tokens."""

Part = Mapping[str, Any]
Growth = Callable[[Part], float]
"""Checks a part, and returns the bytes that it can make of one; raises ValueError where it is refused."""


def check_parts(document: Mapping[str, Any]) -> None:
    """Check the normalizer, pre-tokenizer, post-processor and decoder of a tokenizer.

    Raises:
        ValueError: One is of a kind that edgemix does not know, or beyond its bounds; says which.
    """
    for name, key, kinds in (
        ("normalizer", "normalizers", _NORMALIZERS),
        ("pre_tokenizer", "pretokenizers", _PRE_TOKENIZERS),
        ("post_processor", "processors", _POST_PROCESSORS),
        ("decoder", "decoders", _DECODERS),
    ):
        growth = 1.0
        for count, part in enumerate(_flat(document.get(name), key), start=1):
            kind = part.get("type")
            check = kinds.get(kind) if isinstance(kind, str) else None
            if count > MAX_PARTS:
                raise ValueError(f"its {name} has more than {MAX_PARTS} parts")
            if check is None:
                raise ValueError(f"its {name} is of the kind {str(kind)[:80]!r}, and edgemix knows {', '.join(kinds)}")
            try:
                growth *= check(part)
            except ValueError as error:
                raise ValueError(f"its {name} {kind}: {error}") from None
        if growth > MAX_GROWTH:
            raise ValueError(f"its {name} may make a text more than {MAX_GROWTH:,} times as long")


def _flat(part: Any, key: str, depth: int = 0) -> Iterable[Part]:
    """Yield a part, or those of a sequence."""
    if part is None:
        return
    if not isinstance(part, Mapping) or depth > MAX_DEPTH:
        raise ValueError(f"its {key} are no mapping, or nested more than {MAX_DEPTH} deep")
    if part.get("type") != "Sequence":
        yield part
        return
    for each in _list(part, key):
        yield from _flat(each, key, depth + 1)


def _grows(factor: float = 1.0) -> Growth:
    """Return the check of a part without parameters to bound."""
    return lambda _: factor


def _list(part: Part, name: str, most: int = MAX_PARTS) -> list[Any]:
    found = part.get(name)
    if not isinstance(found, list) or len(found) > most:
        raise ValueError(f"{name} must be a list of at most {most}")
    return found


def _text(part: Part, name: str, *, least: int = 0) -> str:
    text = part.get(name)
    if not isinstance(text, str) or not least <= len(text) <= MAX_AFFIX:
        raise ValueError(f"{name} must be a text of {least} to {MAX_AFFIX} characters")
    return text


def _count(part: Part, name: str, least: int, most: int) -> int:
    number = part.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise ValueError(f"{name} must be a number from {least} to {most}")
    return number


def _pattern(part: Part) -> int:
    """Check a part's pattern; return the fewest bytes that it matches, as far as that is known."""
    pattern = part.get("pattern")
    if not isinstance(pattern, Mapping) or len(pattern) != 1:
        raise ValueError("pattern must be a String or a Regex")
    ((kind, text),) = pattern.items()
    if kind not in ("String", "Regex") or not isinstance(text, str) or not text:
        raise ValueError("pattern must be a String or a Regex that is not empty")
    if kind == "Regex":
        check_pattern(text)
        return 0
    if len(text) > MAX_AFFIX:
        raise ValueError(f"pattern may have at most {MAX_AFFIX} characters")
    return len(text.encode())


def _replace(part: Part) -> float:
    content, matched = len(_text(part, "content").encode()), _pattern(part)
    # An expression may match nothing between two bytes.
    return max(1.0, content / matched) if matched else 1.0 + content


def _prepend(part: Part) -> float:
    return 1.0 + len(_text(part, "prepend").encode())


def _precompiled(part: Part) -> float:
    # The longest replacements are of one character of three bytes; a hostile map may have them for one byte.
    return max(1.0, longest_replacement(part.get("precompiled_charsmap")))


def _split(part: Part) -> float:
    _pattern(part)
    return 1.0


def _metaspace(part: Part) -> float:
    replacement = part.get("replacement", "▁")
    if not isinstance(replacement, str) or len(replacement) != 1:
        raise ValueError("replacement must be one character")
    return 4.0


def _fixed_length(part: Part) -> float:
    _count(part, "length", 1, 1 << 16)
    return 1.0


def _delimiter(part: Part) -> float:
    if not isinstance(part.get("delimiter"), str) or len(part["delimiter"]) != 1:
        raise ValueError("delimiter must be one character")
    return 1.0


def _affix(*names: str, least: int = 0) -> Growth:
    """Return the check of a decoder with short texts."""

    def check(part: Part) -> float:
        for name in names:
            _text(part, name, least=least)
        return 2.0

    return check


def _template(part: Part) -> float:
    for name, sequences in (("single", 1), ("pair", 2)):
        pieces = _list(part, name, MAX_SPECIAL)
        if sum(isinstance(piece, Mapping) and "Sequence" in piece for piece in pieces) > sequences:
            raise ValueError(f"{name} repeats the text")
    special = part.get("special_tokens")
    if not isinstance(special, Mapping) or len(special) > MAX_SPECIAL:
        raise ValueError(f"special_tokens must be a mapping of at most {MAX_SPECIAL}")
    for token in special.values():
        lists = [token.get(name) for name in ("ids", "tokens")] if isinstance(token, Mapping) else [None]
        if not all(isinstance(each, list) and len(each) <= MAX_SPECIAL for each in lists):
            raise ValueError(f"a special token may stand for at most {MAX_SPECIAL} ids")
    return 1.0


_NORMALIZERS: dict[str, Growth] = {
    "BertNormalizer": _grows(3),
    "ByteLevel": _grows(2),
    "Lowercase": _grows(1.5),
    "NFC": _grows(3),
    "NFD": _grows(3),
    "NFKC": _grows(11),
    "NFKD": _grows(11),
    "Nmt": _grows(),
    "Precompiled": _precompiled,
    "Prepend": _prepend,
    "Replace": _replace,
    "Strip": _grows(),
    "StripAccents": _grows(),
}
_PRE_TOKENIZERS: dict[str, Growth] = {
    "BertPreTokenizer": _grows(),
    "ByteLevel": _grows(3),
    "CharDelimiterSplit": _delimiter,
    "Digits": _grows(),
    "FixedLength": _fixed_length,
    "Metaspace": _metaspace,
    "Punctuation": _grows(),
    "Split": _split,
    "UnicodeScripts": _grows(),
    "Whitespace": _grows(),
    "WhitespaceSplit": _grows(),
}
_POST_PROCESSORS: dict[str, Growth] = {
    "BertProcessing": _grows(),
    "ByteLevel": _grows(),
    "RobertaProcessing": _grows(),
    "TemplateProcessing": _template,
}
_DECODERS: dict[str, Growth] = {
    "BPEDecoder": _affix("suffix", least=1),
    "ByteFallback": _grows(3),
    "ByteLevel": _grows(3),
    "CTC": _affix("pad_token", "word_delimiter_token"),
    "Fuse": _grows(),
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": _grows(),
    "WordPiece": _affix("prefix"),
}
