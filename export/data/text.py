"""Turn documents into chunks of token ids, and split them into training and validation text."""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError, library_errors
from edgemix.export.models.tokenizers import leading_token

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

PIECE = 16_384
"""Characters of the pieces that long documents are cut into to be shuffled, split and tokenized."""


def windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Pack documents, separated by the end-of-text token, into chunks of token ids of one length.

    Each chunk begins with the beginning-of-text token if the model family has one, as every text at run time does.
    Tokens after the last whole chunk are dropped; text shorter than one chunk gives one shorter chunk.

    Args:
        documents: The texts.
        tokenizer: A fast tokenizer.
        length: Tokens of a chunk, at least two.
        max_tokens: Largest number of tokens; only as much text is tokenized. Less than `length` gives one shorter
            chunk.
        seed: Seed of the order of the documents' pieces; None keeps their order.

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
    """Return about `count` chunks of one length for algorithms that observe activations.

    Every domain gives equally many, but the domain with the member's `name` as many as all others together. Less text
    gives fewer chunks, or a single shorter one. Their order is shuffled by `seed`.
    """
    shares = {domain: 1.0 if domain != name else max(1.0, len(domains) - 1.0) for domain in domains}
    found = []
    for domain, documents in domains.items():
        tokens = max(length, round(count * shares[domain] / sum(shares.values())) * length)
        found += windows(documents, tokenizer, length, max_tokens=tokens, seed=seed)
    np.random.default_rng(seed).shuffle(found)
    longest = max(map(len, found))
    return [window for window in found if len(window) == longest]


def check_tokens(texts: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Check that a model has a row for every token of its texts: added tokens may lie beyond them.

    Args:
        texts: Token ids.
        tokenizer: The model's tokenizer.
        rows: Number of the model's logits.
        name: The member, for the message.

    Raises:
        InputError: It lacks one.
    """
    highest = max((max(text) for text in texts if text), default=-1)
    if highest >= rows:
        raise InputError(
            f"member {name}: the calibration text holds token {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}), and the model has {rows} rows: 0 to {rows - 1}",
            "Take the token out of the text, or resize the model's embeddings.",
        )


def split(documents: Sequence[str], share: float, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Hold out a share of the text, piece by piece; equal pieces are never in both parts.

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
    """Yield pieces of about `PIECE` characters, cut at line ends, and whether each is its document's last."""
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
    """Yield the ids of each piece, with the end-of-text token after the last piece of a document."""
    core, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    for text, ends in texts:
        with library_errors(f"the tokenizer fails on the text that begins with {text[:40]!r}", kind=InputError):
            ids = core.encode(text, add_special_tokens=False).ids
        yield [*ids, eos] if ends and eos is not None else ids


def _pack(runs: Iterable[list[int]], start: list[int], length: int) -> Iterator[list[int]]:
    capacity = length - len(start)
    pending: list[int] = []
    packed = 0
    for run in runs:
        pending += run
        while len(pending) >= capacity:
            yield [*start, *pending[:capacity]]
            packed += 1
            pending = pending[capacity:]
    if not packed and len(start) + len(pending) >= 2:
        yield [*start, *pending]
