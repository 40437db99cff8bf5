"""Masked words: where they are, and the vocabulary on which members of different tokenizers meet.

Members of one vocabulary mix by token id, over all of it. Others mix over the whole words that all of them know as one
token: "the" is `the` to WordPiece, `Ġthe` to byte-level BPE and `▁the` to SentencePiece, while `##the` and a `the` that
continues a word are parts of words, which no other member shares. Each member's distribution is then that of the word
given that it is a shared one. Letter case counts: with an uncased member only words in lower case are shared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.classification.encoding import EncodedText, TextEncoder

UNREADABLE = "\ufffd"
"""What bytes decode to that are part of a character only."""


@dataclass(frozen=True)
class SharedVocabulary:
    """The strings over which members mix.

    Attributes:
        strings: One for each column of a mixture [strings].
        ids: For each member, the token id of each string [strings].
        whole: Whether it is all of the vocabulary that all members have; otherwise whole words.
    """

    strings: tuple[str, ...]
    ids: tuple[NDArray[np.int64], ...]
    whole: bool


def shared_vocabulary(encoders: Sequence[TextEncoder]) -> SharedVocabulary:
    """Return what members can mix over: see the module.

    Raises:
        InputError: They share no word.
    """
    vocabularies = [encoder.vocab() for encoder in encoders]
    first = vocabularies[0]
    if all(vocabulary == first for vocabulary in vocabularies[1:]):
        rows = [encoder.vocabulary for encoder in encoders if encoder.vocabulary is not None]
        ids = [id_ for id_ in sorted(set(first.values())) if all(id_ < most for most in rows)]
        strings = tuple(encoders[0].decode_batch([[id_] for id_ in ids]))
        return SharedVocabulary(strings, (np.array(ids, np.int64),) * len(encoders), whole=True)
    words = [whole_words(encoder) for encoder in encoders]
    shared = tuple(word for word in words[0] if all(word in other for other in words[1:]))
    if not shared:
        raise InputError(
            "the members' vocabularies have no whole word in common, so there is nothing to mix over",
            "Mix members whose tokenizers know the same words.",
        )
    return SharedVocabulary(
        shared, tuple(np.array([own[word] for word in shared], np.int64) for own in words), whole=False
    )


def whole_words(encoder: TextEncoder) -> dict[str, int]:
    """Return the tokens that are whole words after another word, by what the tokenizer's decoder makes of them:
    word -> id, in the order of ids. Special tokens and parts of characters are left out.
    """
    vocabulary = encoder.vocab()
    special = encoder.special_ids
    most = encoder.vocabulary
    ids = sorted({id_ for id_ in vocabulary.values() if id_ not in special and (most is None or id_ < most)})
    texts = encoder.decode_batch([[id_] for id_ in ids])
    # Any word will do as the one before; letters alone are never joined to what follows by a decoder's cleaning.
    before = next((place for place, text in enumerate(texts) if text.isascii() and text.strip().isalpha()), None)
    if before is None:
        return {}
    words: dict[str, int] = {}
    start = f"{texts[before]} "
    for id_, text in zip(ids, encoder.decode_batch([[ids[before], id_] for id_ in ids]), strict=True):
        word = text.removeprefix(start)
        if text.startswith(start) and word and not any(map(str.isspace, word)) and UNREADABLE not in word:
            words.setdefault(word, id_)
    return words


def shared_distribution(
    log_probabilities: NDArray[np.float32], ids: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a member's log-probabilities of shared strings [masks, strings], given that the word is one of them; and
    its probability that it is [masks]. A member that finds all of them impossible abstains: its row is uniform.

    Args:
        log_probabilities: Of the member's tokens at each masked place [masks, vocabulary].
        ids: The member's in a `SharedVocabulary` [strings].
    """
    shared = log_probabilities[:, ids]
    peak = shared.max(axis=-1, keepdims=True, initial=np.finfo(np.float32).min)
    total = np.exp(shared - peak).sum(axis=-1, keepdims=True)
    given = shared - peak - np.log(np.maximum(total, 1))
    return np.where(total > 0, given, -np.log(np.float32(len(ids)))), (total * np.exp(peak))[:, 0]


def with_own_mask(text: str, masks: Sequence[str], own: str) -> tuple[str, int]:
    """Return a text with the mask tokens of all members replaced by a member's own, and how many there are.

    Args:
        text: With masks as any member writes them.
        masks: The mask tokens of all members.
        own: That of the member who reads the text.
    """
    longest_first = sorted(set(masks), key=len, reverse=True)
    return re.subn("|".join(map(re.escape, longest_first)), lambda _: own, text)


def mask_places(text: EncodedText, encoder: TextEncoder, expected: int) -> NDArray[np.int64]:
    """Return the tokens of a text that are masks [masks].

    Args:
        text: A text as its tokens.
        encoder: The member's.
        expected: How many masks the text has, as `with_own_mask` counts them.

    Raises:
        InputError: It has none, or the member's window ends before the last, or the member has no mask token.
    """
    mask, name = encoder.special_id("mask_token"), encoder.special_tokens.get("mask_token")
    if mask is None:
        raise InputError("a member's tokenizer has no mask token", "Use members for the task fill-mask.")
    if not expected:
        raise InputError("the text has no masked word", f"Write {name} where a word is to be found.")
    places = np.flatnonzero(text.ids == mask)
    if len(places) != expected:
        raise InputError(
            f"of {expected} masked words a member sees {len(places)}: it reads {encoder.max_length} tokens",
            "Shorten the text.",
        )
    return places


def top_strings(
    log_probabilities: NDArray[np.float32], vocabulary: SharedVocabulary, count: int
) -> tuple[tuple[str, float], ...]:
    """Return the most probable strings of one masked place with their probabilities, the first first.

    Args:
        log_probabilities: Of the mixture [strings].
        vocabulary: What it is over.
        count: How many, if there are as many.
    """
    order = np.argsort(-log_probabilities, kind="stable")[: max(count, 0)]
    return tuple((vocabulary.strings[place], float(np.exp(log_probabilities[place]))) for place in order)
