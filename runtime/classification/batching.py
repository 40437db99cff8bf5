"""Batches of texts of similar length, so that little of a batch is padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.classification.encoding import EncodedText

PaddingSide = Literal["right", "left"]

_PADDING = 0.25
"""Most of a batch that may be padding."""
_FREE_PADDING = 64
"""Tokens of padding that cost less than a call of the graph does, whatever their share."""


@dataclass(frozen=True)
class PaddedBatch:
    """Texts as a graph takes them, padded to the longest.

    Attributes:
        ids: int64 [texts, tokens].
        attention_mask: int64 [texts, tokens]; 0 at padding.
        type_ids: int64 [texts, tokens]; which text of a pair, as the tokenizer's template says.
    """

    ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    type_ids: NDArray[np.int64]


def pad(
    texts: Sequence[EncodedText], *, pad_id: int = 0, pad_type_id: int = 0, side: PaddingSide = "right"
) -> PaddedBatch:
    """Pad texts to the longest of them; at least one."""
    longest = max(map(len, texts))
    ids = np.full((len(texts), longest), pad_id, np.int64)
    type_ids = np.full((len(texts), longest), pad_type_id, np.int64)
    attention_mask = np.zeros((len(texts), longest), np.int64)
    for row, text in enumerate(texts):
        tokens = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, tokens] = text.ids
        type_ids[row, tokens] = text.type_ids
        attention_mask[row, tokens] = 1
    return PaddedBatch(ids, attention_mask, type_ids)


def length_batches(lengths: Sequence[int] | NDArray[np.int64], most_tokens: int) -> list[NDArray[np.int64]]:
    """Return batches as indices of texts, the longest first; each text is in one batch.

    A batch has at most `most_tokens` tokens with its padding, unless it is a single text, and at most a quarter of it
    is padding, unless that is a few tokens only.

    Args:
        lengths: Tokens of each text.
        most_tokens: Most tokens of a batch, padding included.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    first, used, cuts = 0, 0, []
    for place, size in enumerate(sizes[order].tolist()):
        total = (place - first + 1) * int(sizes[order[first]])
        padding = total - used - size
        if place > first and (total > most_tokens or padding > max(_FREE_PADDING, _PADDING * total)):
            cuts.append(place)
            first, used = place, 0
        used += size
    return [batch for batch in np.split(order, cuts) if len(batch)]
