"""Documents to windows of token ids, for training, calibration and validation, and the split that keeps them apart."""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError
from edgemix.export.models.tokenizers import leading_token

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

PIECE = 16_384
"""Characters of the pieces that long documents are cut into: what is shuffled, split and tokenised at a time."""


def windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Token windows of one length, packed from documents with the end-of-text token between them.

    Each window begins with the beginning-of-text token where the model family has one, as every text at run time does.
    What is left after the last whole window is dropped; less text than one window gives one shorter window.

    Args:
        documents: The texts.
        tokenizer: A fast tokenizer.
        length: Tokens of a window, at least two.
        max_tokens: Take so many tokens at most; only the text that they need is tokenised. Less than `length` makes
            one shorter window.
        seed: Takes the pieces of the documents in an order shuffled by it; None keeps their order.

    Raises:
        InputError: The documents have less than two tokens together.
    """
    length = length if max_tokens is None else min(length, max_tokens)
    if length < 2:
        raise InputError(f"a window of {length} tokens predicts nothing", "Take at least two.")
    texts = list(_pieces(documents))
    if seed is not None:
        np.random.default_rng(seed).shuffle(texts)
    leading = leading_token(tokenizer)
    start = [] if leading is None else [leading]
    most = None if max_tokens is None else max_tokens // length
    packed = list(islice(_pack(_token_runs(texts, tokenizer), start, length), most))
    if not packed:
        raise InputError("the text has less than two tokens", "Give more text.")
    return packed


def calibration_windows(
    domains: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    *,
    name: str = "",
    seed: int = 0,
) -> list[list[int]]:
    """About `count` windows of one length for algorithms that look at activations: as many from every domain, and as
    many from the one that is called like the member, `name`, as from all others together.

    Less text gives fewer windows, and less than one window of text a shorter one. Their order is shuffled by `seed`.
    """
    shares = {domain: 1.0 if domain != name else max(1.0, len(domains) - 1.0) for domain in domains}
    found = []
    for domain, documents in domains.items():
        tokens = max(length, round(count * shares[domain] / sum(shares.values())) * length)
        found += windows(documents, tokenizer, length, max_tokens=tokens, seed=seed)
    np.random.default_rng(seed).shuffle(found)
    longest = max(map(len, found))
    return [window for window in found if len(window) == longest]


def split(documents: Sequence[str], share: float, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Keep a share of the text out of the rest, piece by piece; equal pieces never lie on both sides.

    Which pieces are held out depends on their content and the seed alone, not on their order.

    Returns:
        The rest and the part held out, as documents. A text of one piece cannot be split: nothing is held out.
    """
    pieces = list(dict.fromkeys(text for text, _ in _pieces(documents)))
    if len(pieces) < 2:
        return pieces, []
    by_digest = sorted(pieces, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    held_out = set(by_digest[: min(max(1, round(share * len(pieces))), len(pieces) - 1)])
    return [text for text in pieces if text not in held_out], [text for text in pieces if text in held_out]


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents cut at line ends into pieces of about `PIECE` characters, each with whether its document ends there."""
    for document in documents:
        at = 0
        while len(document) - at > PIECE:
            end = document.rfind("\n", at, at + PIECE) + 1
            end = end if end > at else at + PIECE
            yield document[at:end], False
            at = end
        if document[at:]:
            yield document[at:], True


def _token_runs(texts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The ids of each piece, with the end-of-text token after the last one of a document."""
    core, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    for text, ends in texts:
        ids = core.encode(text, add_special_tokens=False).ids
        yield [*ids, eos] if ends and eos is not None else ids


def _pack(runs: Iterable[list[int]], start: list[int], length: int) -> Iterator[list[int]]:
    room = length - len(start)
    waiting: list[int] = []
    packed = 0
    for run in runs:
        waiting += run
        while len(waiting) >= room:
            yield [*start, *waiting[:room]]
            packed += 1
            waiting = waiting[room:]
    if not packed and len(start) + len(waiting) >= 2:
        yield [*start, *waiting]
