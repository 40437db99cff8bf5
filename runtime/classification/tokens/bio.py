"""Labels of the kind B-X, I-X and O, and the most probable sequence of them that is consistent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_IMPOSSIBLE = -1e5
"""Log-probability of what is impossible: consistency comes first, even where no consistent sequence is possible."""


@dataclass(frozen=True)
class LabelScheme:
    """The labels of words: `B-X` begins an entity of type X, `I-X` continues one, any other stands for itself.

    Where there is a label B-X, I-X may follow only B-X and I-X; without one, I-X also begins entities.

    Attributes:
        names: Their names, by index.
    """

    names: tuple[str, ...]

    @cached_property
    def begins(self) -> NDArray[np.bool_]:
        """Which labels always begin an entity [labels]."""
        return np.array([name.startswith("B-") for name in self.names], np.bool_)

    @cached_property
    def types(self) -> NDArray[np.int64]:
        """The type of each label, as a number that labels of one type share [labels]."""
        numbers: dict[str, int] = {}
        types = [name[2:] if name.startswith(("B-", "I-")) else name for name in self.names]
        return np.array([numbers.setdefault(name, len(numbers)) for name in types], np.int64)

    @cached_property
    def continuing(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The labels I-X that may not begin an entity, and the B-X of each."""
        places = {name: place for place, name in enumerate(self.names)}
        pairs = [
            (place, places[f"B-{name[2:]}"])
            for place, name in enumerate(self.names)
            if name.startswith("I-") and f"B-{name[2:]}" in places
        ]
        inside, begins = np.array(pairs, np.int64).reshape(-1, 2).T
        return inside, begins

    def continued(self, log_probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the distributions [words, labels] of words that go on where another began: B-X counts as I-X."""
        inside, begins = self.continuing
        result = log_probabilities.copy()
        result[:, inside] = np.logaddexp(result[:, inside], result[:, begins])
        result[:, begins] = -np.inf
        return result


def viterbi(
    log_probabilities: NDArray[np.float32],
    scheme: LabelScheme,
    lengths: Sequence[int] | NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Return the most probable consistent labels [words] of texts.

    Args:
        log_probabilities: Of each word of all texts, one after another [words, labels]; -inf is allowed, NaN is not.
        scheme: The labels.
        lengths: Words of each text; by default it is one text.
    """
    scores = np.maximum(log_probabilities.astype(np.float64), _IMPOSSIBLE)
    inside, begins = scheme.continuing
    if not len(inside) or not len(scores):
        return np.asarray(scores.argmax(axis=-1), np.int64)
    starts, lengths = _segments(scores, scheme, [len(scores)] if lengths is None else lengths)
    steps = int(lengths[0])
    active = len(lengths) - np.searchsorted(lengths[::-1], np.arange(steps), side="right")
    origins = np.zeros(scores.shape, np.int32)
    scores[starts[:, None], inside] = -np.inf
    for step in range(1, steps):
        words = starts[: active[step]] + step
        before = scores[words - 1]
        best = before.argmax(axis=-1)[:, None]
        # At first as if any label could follow any, then those that continue.
        own = scores[words]
        total = own + np.take_along_axis(before, best, axis=-1)
        goes_on = before[:, inside] > before[:, begins]
        total[:, inside] = own[:, inside] + np.where(goes_on, before[:, inside], before[:, begins])
        origin = np.repeat(best, scores.shape[1], axis=1)
        origin[:, inside] = np.where(goes_on, inside, begins)
        scores[words], origins[words] = total, origin
    labels = np.empty(len(scores), np.int64)
    labels[starts + lengths - 1] = scores[starts + lengths - 1].argmax(axis=-1)
    for step in range(steps - 1, 0, -1):
        words = starts[: active[step]] + step
        labels[words - 1] = origins[words, labels[words]]
    return labels


def _segments(
    scores: NDArray[np.float64], scheme: LabelScheme, lengths: Sequence[int] | NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the starts and lengths of parts of texts that are decoded for themselves, the longest first.

    Where at a word each B-X is at least as probable as its I-X, some best sequence has no I-X there, as B-X may follow
    more and be followed by the same. The word then begins a part, so a long text is many short ones.
    """
    inside, begins = scheme.continuing
    cut = np.asarray((scores[:, begins] >= scores[:, inside]).all(axis=-1))
    ends = np.cumsum(lengths, dtype=np.int64)
    firsts = ends - lengths
    cut[firsts[firsts < ends]] = True
    starts = np.flatnonzero(cut)
    sizes = np.diff(starts, append=len(scores))
    order = np.argsort(-sizes, kind="stable")
    return starts[order], sizes[order]
