"""Entities: spans of a text, made of the labels of its tokens or words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from edgemix.errors import InputError
from edgemix.runtime.classification.tokens.bio import viterbi
from edgemix.runtime.classification.tokens.words import Pooling, pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.classification.encoding import EncodedText
    from edgemix.runtime.classification.tokens.bio import LabelScheme

Aggregation = Literal["none", "simple", "first", "average", "max"]
"""As transformers' TokenClassificationPipeline: each unit for itself; adjacent units of one type together; the same
with one label for all units of a word (see `Pooling`)."""
NO_ENTITY = "O"


@dataclass(frozen=True, slots=True)
class Entity:
    """A span of a text with a label.

    Attributes:
        label: Its type (`PER`); where units are not aggregated, the unit's label (`B-PER`).
        start: Its first character.
        end: The character after its last.
        text: What stands there.
        score: Mean probability of its units' labels.
    """

    label: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True)
class LabeledTokens:
    """The tokens of a text, without special tokens, and the distributions of their labels.

    Attributes:
        tokens: As the vocabulary writes them [tokens].
        ids: Their ids [tokens].
        offsets: First character of each, and the one after its last [tokens, 2].
        log_probabilities: Of their labels [tokens, labels].
    """

    tokens: tuple[str, ...]
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]


def merge_windows(windows: Sequence[EncodedText], log_probabilities: Sequence[NDArray[np.float32]]) -> LabeledTokens:
    """Return the tokens of a text that was read in windows, or in one.

    Of windows that share a token, the one counts in which it is farther from the shared edge.

    Args:
        windows: As `TextEncoder.windows` returns them.
        log_probabilities: Of the labels of each window's tokens, special tokens included, without padding
            [tokens, labels].
    """
    places = [np.flatnonzero(~window.special) for window in windows]
    begins = [window.first for window in windows]
    ends = [begin + len(own) for begin, own in zip(begins, places, strict=True)]
    # The middle of what two neighbors share; the earlier has the odd one.
    cuts = [(end + begin + 1) // 2 for end, begin in zip(ends[:-1], begins[1:], strict=True)]
    kept = [
        own[low - begin : high - begin]
        for own, begin, low, high in zip(places, begins, [0, *cuts], [*cuts, ends[-1]], strict=True)
    ]
    tokens = []
    for window, own in zip(windows, kept, strict=True):
        written = window.tokens
        tokens += [written[place] for place in own]
    return LabeledTokens(
        tuple(tokens),
        np.concatenate([window.ids[own] for window, own in zip(windows, kept, strict=True)]),
        np.concatenate([window.offsets[own] for window, own in zip(windows, kept, strict=True)]),
        np.concatenate([values[own] for values, own in zip(log_probabilities, kept, strict=True)]),
    )


def subwords(text: str, tokens: LabeledTokens, *, marked: bool, unknown_id: int | None = None) -> NDArray[np.bool_]:
    """Return which tokens continue a word [tokens], as transformers' pipeline decides it.

    Args:
        text: The text that was read.
        tokens: Its tokens.
        marked: Whether the vocabulary marks such tokens (`TextEncoder.marks_subwords`): then they are those that are
            not written as they stand in the text; otherwise those without a space before or at their beginning.
        unknown_id: Id of the token of what is unknown, which continues nothing.
    """
    starts, ends = tokens.offsets.T
    if marked:
        continues = np.array([len(token) for token in tokens.tokens], np.int64) != ends - starts
    else:
        spaces = np.frombuffer(f"{text}x".encode("utf-32-le"), np.uint32) == ord(" ")
        continues = (starts > 0) & ~spaces[np.maximum(starts - 1, 0)] & ~spaces[starts]
    return np.asarray(continues & (tokens.ids != (-1 if unknown_id is None else unknown_id)))


def aggregate(
    text: str,
    log_probabilities: NDArray[np.float32],
    offsets: NDArray[np.int64],
    scheme: LabelScheme,
    *,
    aggregation: Aggregation = "simple",
    continues: NDArray[np.bool_] | None = None,
) -> tuple[Entity, ...]:
    """Return the entities of a text by the most probable label of each unit (token or word).

    For the tokens of one tokenizer these are the entities of transformers' TokenClassificationPipeline. Its `word` is
    a decoding of tokens, where `text` is what stands in the text.

    Args:
        text: The text, which offsets count in.
        log_probabilities: Of each unit's labels [units, labels].
        offsets: First character of each unit, and the one after its last [units, 2].
        scheme: The labels.
        aggregation: See `Aggregation`.
        continues: Which units continue a word [units], as `subwords` returns it; by default each is a word.

    Raises:
        InputError: An unknown aggregation.
    """
    if aggregation not in get_args(Aggregation):
        raise InputError(
            f"aggregation={aggregation!r} is unknown", f"Choose one of: {', '.join(get_args(Aggregation))}."
        )
    if aggregation not in ("none", "simple") and continues is not None and len(continues):
        firsts = np.flatnonzero(~continues | (np.arange(len(continues)) == 0))
        log_probabilities = pool(log_probabilities, firsts, cast("Pooling", aggregation))
        lasts = np.append(firsts[1:], len(continues)) - 1
        offsets = np.stack([offsets[firsts, 0], offsets[lasts, 1]], axis=1)
    labels = log_probabilities.argmax(axis=-1)
    return entities(text, labels, log_probabilities, offsets, scheme, grouped=aggregation != "none")


def consistent_entities(
    text: str, log_probabilities: NDArray[np.float32], offsets: NDArray[np.int64], scheme: LabelScheme
) -> tuple[Entity, ...]:
    """Return the entities of a text by the most probable consistent sequence of labels (`bio.viterbi`); arguments as
    `aggregate`.
    """
    return entities(text, viterbi(log_probabilities, scheme), log_probabilities, offsets, scheme)


def entities(
    text: str,
    labels: NDArray[np.int64],
    log_probabilities: NDArray[np.float32],
    offsets: NDArray[np.int64],
    scheme: LabelScheme,
    *,
    grouped: bool = True,
) -> tuple[Entity, ...]:
    """Return the entities that labels of units stand for, without those of the label `O`.

    A unit goes on with the entity before it if it has its type and no label B-X.

    Args:
        text: The text, which offsets count in.
        labels: Of each unit [units].
        log_probabilities: Of each unit's labels [units, labels].
        offsets: First character of each unit, and the one after its last [units, 2].
        scheme: The labels.
        grouped: Whether adjacent units make one entity.
    """
    if not len(labels):
        return ()
    types = scheme.types[labels]
    begins = scheme.begins[labels] | (np.diff(types, prepend=-1) != 0) | (not grouped)
    firsts = np.flatnonzero(begins)
    sizes = np.diff(firsts, append=len(labels))
    probabilities = np.exp(log_probabilities[np.arange(len(labels)), labels].astype(np.float64))
    scores = np.add.reduceat(probabilities, firsts) / sizes
    names = [name.split("-", 1)[-1] if grouped else name for name in scheme.names]
    spans = zip(labels[firsts], offsets[firsts, 0], offsets[firsts + sizes - 1, 1], scores, strict=True)
    return tuple(
        Entity(names[label], int(start), int(end), text[start:end], float(score))
        for label, start, end, score in spans
        if names[label] != NO_ENTITY
    )
