"""Reading of a tokenizer.json, and all that is checked of it before native code builds a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from edgemix.errors import InputError
from edgemix.numbers import is_finite
from edgemix.tokenizer_files.parts import check_parts

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 64 << 20
"""Most bytes of a tokenizer.json; Gemma's, of 262,144 tokens, has 33 MB."""
MAX_TOKENS = 1 << 24
"""Ids are below this."""
MAX_TOKEN = 4_096
"""Most characters of a token."""
MAX_PIECE = 256
"""Most characters of a piece of a Unigram model: its time is that of all pieces at each place of a text."""
MAX_WORD = 256
"""Most characters of a word that WordPiece splits: its time is their cube."""

_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def read_document(text: str | bytes) -> dict[str, Any]:
    """Parse a tokenizer.json.

    Raises:
        InputError: It is too large, or not JSON of an object: no text of valid Unicode, numbers beyond all bounds, or
            nested too deeply.
    """
    size = len(text) if isinstance(text, bytes) else len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise _refused(f"it has {size:,} bytes, and may have {MAX_BYTES:,}")
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError, MemoryError) as error:
        raise _refused(f"{type(error).__name__} {error}") from None


def check_document(document: Mapping[str, Any]) -> None:
    """Check what the tokenizers library would build from a parsed tokenizer.json.

    Raises:
        InputError: A part is of no known kind, or beyond its bounds: it may abort the process, take time or memory
            without measure, or give random ids.
    """
    try:
        _check_model(document.get("model"))
        _check_added(document.get("added_tokens") or [])
        check_parts(document)
    except ValueError as error:
        raise _refused(str(error)) from None


def checked_text(path: Path) -> str:
    """Read a tokenizer.json, check it, and return the text to build the tokenizer from: exactly what was checked, as
    parsers differ where a key is there twice. Truncation and padding are left out.

    Raises:
        InputError: As `read_document` and `check_document`.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        document = read_document(file.read(MAX_BYTES + 1))
    check_document(document)
    return msgspec.json.encode({**document, "truncation": None, "padding": None}).decode()


def _refused(reason: str) -> InputError:
    return InputError(
        f"not a tokenizer.json that edgemix reads: {reason}",
        "Export the tokenizer with the tokenizers library (a fast tokenizer of transformers).",
    )


def _check_model(model: Any) -> None:
    model = model if isinstance(model, Mapping) else {"type": None}
    kind, listed = model.get("type", "BPE"), model.get("vocab")
    if kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise ValueError(f"its model is of the kind {str(kind)[:80]!r}")
    if kind == "Unigram":
        _check_pieces(listed, model.get("unk_id"))
    elif isinstance(listed, Mapping):
        _check_tokens(listed.items())
    else:
        raise ValueError("its vocabulary is no mapping")
    if model.get("dropout"):
        raise ValueError("its merges are dropped at random (dropout), so a text would have other ids each time")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        value = model.get(name)
        if value is not None and not (isinstance(value, str) and len(value) <= MAX_TOKEN):
            raise ValueError(f"{name} is no text of at most {MAX_TOKEN:,} characters")
    if kind == "WordPiece":
        most = model.get("max_input_chars_per_word", 100)
        if not isinstance(most, int) or not 0 <= most <= MAX_WORD:
            raise ValueError(f"max_input_chars_per_word must be a number from 0 to {MAX_WORD}")


def _check_pieces(pieces: Any, unknown: Any) -> None:
    if not isinstance(pieces, list) or not all(isinstance(piece, list) and len(piece) == 2 for piece in pieces):
        raise ValueError("its vocabulary is no list of pairs of a piece and a score")
    _check_tokens((piece[0], place) for place, piece in enumerate(pieces))
    if not all(isinstance(piece[1], float | int) and is_finite(piece[1]) for piece in pieces):
        raise ValueError("a piece's score is no finite number")
    if not all(len(piece[0]) <= MAX_PIECE for piece in pieces):
        raise ValueError(f"a piece has more than {MAX_PIECE} characters")
    if unknown is not None and not (isinstance(unknown, int) and 0 <= unknown < len(pieces)):
        raise ValueError(f"unk_id is none of its {len(pieces):,} pieces")


def _check_tokens(tokens: Iterable[tuple[Any, Any]]) -> None:
    for token, number in tokens:
        if type(token) is not str or len(token) > MAX_TOKEN:
            raise ValueError(f"a token is no text of at most {MAX_TOKEN:,} characters")
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise ValueError(
                f"token {token[:80]!r} has the id {str(number)[:80]}, and may have 0 to {MAX_TOKENS - 1:,}"
            )


def _check_added(added: Any) -> None:
    if not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        raise ValueError("added_tokens is no list of tokens")
    _check_tokens((token.get("content"), token.get("id")) for token in added)
    for token in added:
        if not all(isinstance(token.get(flag, False), bool) for flag in _FLAGS):
            raise ValueError(f"the added token {token['content'][:80]!r} has a flag that is neither true nor false")
