"""Explanations: which words mattered, which rules fired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.classification.tokens.words import text_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.runtime.classification.classifier import Prediction
    from edgemix.runtime.classification.rules import FiredRule

LONGEST_TEXT = 1 << 16
"""Most characters of a text that are explained: each part left out makes another text."""
MOST_PARTS = 128
"""Most parts of a text that are left out in turn; of longer texts a part is several words."""


@dataclass(frozen=True, slots=True)
class WordEffect:
    """How much a part of a text counted.

    Attributes:
        start: Its first character.
        end: The character after its last.
        text: What stands there.
        effect: What the probability of the predicted label loses without it; negative where it gains.
    """

    start: int
    end: int
    text: str
    effect: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a text has its label.

    Attributes:
        prediction: The answer, with each member's share and distribution.
        words: The text's parts in order.
        rules: Name of each member that is rules -> the rules that fired, with their places in the text.
    """

    prediction: Prediction
    words: tuple[WordEffect, ...]
    rules: dict[str, tuple[FiredRule, ...]]


def parts_of(text: str) -> list[tuple[int, int]]:
    """Return the places of a text's words, or of at most `MOST_PARTS` runs of them."""
    words = text_words(text)
    groups = np.array_split(words, min(len(words), MOST_PARTS)) if len(words) else []
    return [(int(group[0, 0]), int(group[-1, 1])) for group in groups]


def occluded(text: str, parts: Sequence[tuple[int, int]]) -> list[str]:
    """Return the text without each of its parts."""
    return [f"{text[:start].rstrip()} {text[end:].lstrip()}".strip() for start, end in parts]


def effects(
    text: str, parts: Sequence[tuple[int, int]], whole: Prediction, without: Sequence[Prediction]
) -> tuple[WordEffect, ...]:
    """Return the effect of each part on the label of a text, from the answers with and without it."""
    if whole.label is None:
        return tuple(WordEffect(start, end, text[start:end], 0.0) for start, end in parts)
    before = whole.probabilities[whole.label]
    return tuple(
        WordEffect(start, end, text[start:end], before - each.probabilities[whole.label])
        for (start, end), each in zip(parts, without, strict=True)
    )
