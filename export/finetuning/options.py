"""Settings of fine-tuning, for one model or for the members of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from edgemix.export.data.text import windows
from edgemix.export.training.loop import TrainingBudget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

DEFAULT_STEPS = 200
HELD_OUT = 0.05
"""Fraction of the text that is held out for validation if no validation text is given."""

_MOST_TOKENS = 5_000_000
_VALIDATION_TOKENS = 4_096


class TrainingOptions(TypedDict, total=False):
    """The fields of `TrainingSettings`, as keyword arguments."""

    rank: int
    alpha: float | None
    steps: int | None
    minutes: float | None
    batch: int
    length: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class TrainingSettings:
    """How adapters are trained.

    Attributes:
        rank: Rank of each update of a new adapter.
        alpha: Updates are scaled by alpha / rank; twice the rank by default.
        steps: Optimizer steps; `DEFAULT_STEPS` if `minutes` is not given either.
        minutes: Time limit, including the time spent before an interruption.
        batch: Windows per step, of `length` tokens each.
        length: Tokens per window, at most the model's context.
        learning_rate: Peak learning rate; it rises, then falls to zero with the steps or minutes used.
        seed: Seed of initialization, the order of the text and dropout.
    """

    rank: int = 16
    alpha: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    length: int = 256
    learning_rate: float = 5e-4
    seed: int = 0

    @property
    def budget(self) -> TrainingBudget:
        steps = DEFAULT_STEPS if self.steps is None and self.minutes is None else self.steps
        return TrainingBudget(steps, self.minutes and self.minutes * 60)

    def windows(self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> NDArray[np.int64]:
        """Cut documents into as many windows as the budget can use: int64 [windows, length].

        Raises:
            InputError: There is too little text.
        """
        needed = min(_MOST_TOKENS, (self.budget.steps or _MOST_TOKENS) * self.batch * length)
        return np.array(windows(documents, tokenizer, length, max_tokens=needed, seed=self.seed), np.int64)


def held_out_windows(
    texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[NDArray[np.int64]]:
    """Cut validation text into windows, about equally many of every domain: each int64 [windows, at most length].

    Args:
        texts: Documents by domain.
        tokenizer: A fast tokenizer.
        length: Tokens per window; a shorter text makes one shorter window.

    Raises:
        InputError: There is too little text.
    """
    given = [documents for documents in texts.values() if documents]
    share = _VALIDATION_TOKENS // max(1, len(given))
    return [np.array(windows(documents, tokenizer, length, max_tokens=max(2, share)), np.int64) for documents in given]
