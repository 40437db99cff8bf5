"""The words of a text, on which members of different tokenizers meet: their tokens' distributions, by word."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from edgemix.errors import InputError
from edgemix.runtime.classification.encoding import word_starts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.classification.tokens.bio import LabelScheme

Pooling = Literal["first", "average", "max"]
"""How the distribution of a word is made of those of its tokens: that of the first, the mean of the probabilities, or
that of the token whose most probable label is the most probable."""

_SPACE, _LETTER, _ALONE = range(3)
_UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Burmese, Khmer
    *((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F)),  # kana, Han
)
"""Scripts that put no spaces between words."""


def text_words(text: str) -> NDArray[np.int64]:
    """Return the first character of each word of a text, and the one after its last [words, 2].

    A word is a run of letters, digits and marks; every punctuation mark, symbol, and letter of a script without spaces
    is one of its own.
    """
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    distinct, places = np.unique(points, return_inverse=True)
    kinds = np.array([_kind(int(point)) for point in distinct], np.int8)[places]
    changes = np.concatenate([[True], (kinds[1:] != kinds[:-1]) | (kinds[1:] == _ALONE)])[: len(points)]
    starts = np.flatnonzero(changes)
    ends = np.append(starts[1:], len(points))[: len(starts)]
    words: NDArray[np.int64] = np.stack([starts, ends], axis=1)[kinds[starts] != _SPACE]
    return words


def _kind(point: int) -> int:
    character = chr(point)
    category = unicodedata.category(character)
    if character.isspace() or category == "Cc":
        return _SPACE
    if category[0] in "PS" or (category[0] == "L" and any(low <= point <= high for low, high in _UNSPACED)):
        return _ALONE
    return _LETTER


def given_words(words: Sequence[str]) -> NDArray[np.int64]:
    """Return the places [words, 2] of words in the text of all with a space between."""
    starts = word_starts(words)
    return np.stack([starts, starts + np.array([len(word) for word in words], np.int64)], axis=1)


def on_words(
    log_probabilities: NDArray[np.float32],
    offsets: NDArray[np.int64],
    words: NDArray[np.int64],
    scheme: LabelScheme,
    pooling: Pooling = "first",
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a member's distributions on words [words, labels], and which words it has read [words].

    A token belongs to the word in which it begins. A word in which no token begins continues the one whose token it is
    part of: it has that token's distribution, with B-X as I-X. Where the member has no token at all, it abstains: the
    row is uniform, and false in the second array.

    Args:
        log_probabilities: Of each token of the text in order, without special tokens [tokens, labels].
        offsets: First character of each token, and the one after its last [tokens, 2].
        words: Those of the text, as `text_words` or `given_words` have them.
        scheme: The labels.
        pooling: How tokens of one word are combined.
    """
    check_pooling(pooling)
    result = np.full((len(words), len(scheme.names)), -np.log(len(scheme.names)), np.float32)
    read = np.zeros(len(words), np.bool_)
    kept = offsets[:, 0] < offsets[:, 1]
    if not len(words) or not kept.any():
        return result, read
    log_probabilities, starts, ends = log_probabilities[kept], offsets[kept, 0], offsets[kept, 1]
    starts = np.maximum.accumulate(starts)
    home = np.searchsorted(words[:, 1], starts, side="right")
    inside = home < len(words)
    inside[inside] = words[home[inside], 0] < ends[inside]
    if inside.any():
        home = home[inside]
        groups = np.flatnonzero(np.diff(home, prepend=-1))
        result[home[groups]] = pool(log_probabilities[inside], groups, pooling)
        read[home[groups]] = True
    missing = np.flatnonzero(~read)
    covering = np.searchsorted(starts, words[missing, 0], side="right") - 1
    covered = (covering >= 0) & (ends[covering] > words[missing, 0])
    result[missing[covered]] = scheme.continued(log_probabilities[covering[covered]])
    read[missing[covered]] = True
    return result, read


def pool(log_probabilities: NDArray[np.float32], groups: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float32]:
    """Return one distribution [groups, labels] of each group of tokens.

    Args:
        log_probabilities: [tokens, labels].
        groups: The first token of each group; the first group begins with the first token.
        pooling: See `Pooling`.
    """
    if pooling == "first" or not len(groups):
        return log_probabilities[groups]
    sizes = np.diff(groups, append=len(log_probabilities))
    if pooling == "average":
        total = np.add.reduceat(np.exp(log_probabilities), groups, axis=0)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(total / sizes[:, None]), np.float32)
    peaks = log_probabilities.max(axis=-1)
    highest = np.flatnonzero(peaks == np.repeat(np.maximum.reduceat(peaks, groups), sizes))
    return log_probabilities[highest[np.searchsorted(highest, groups)]]


def check_pooling(pooling: str) -> None:
    """Raise InputError unless `pooling` names a way to combine tokens."""
    if pooling not in get_args(Pooling):
        raise InputError(f"pooling={pooling!r} is unknown", f"Choose one of: {', '.join(get_args(Pooling))}.")
