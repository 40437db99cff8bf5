"""What the student reads: windows of the recipe's training text, the domains taking turns, and a part held out.

Windows come from anywhere in a domain's text: of long documents taken one after the other, a student that has minutes
would read three or four.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError
from edgemix.export.data.text import split, windows
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from edgemix.recipe.schema import Recipe

HELD_OUT = 0.03
"""Share of each domain's training text on which the student is eval_cache."""
HELD_OUT_TOKENS = 8_192
"""Most tokens of it, over all domains."""
_TOKENISED = 20_000_000
"""Most tokens of a domain's text that windows are taken from."""


@dataclass(frozen=True)
class DistillationTexts:
    """Windows int64 [windows, length] to learn from and to be eval_cache on; equal pieces of text never lie in both.

    Any beginning of either holds as much of every domain as there is, in an order that only the seed decides.
    """

    training: NDArray[np.int64]
    held_out: NDArray[np.int64]


def read_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int) -> DistillationTexts:
    """Read a recipe's training text.

    Args:
        recipe: With `data.training`.
        tokenizer: The members'.
        length: Tokens of a window.
        max_tokens: As much training text as is of use; only what it takes is tokenised.

    Raises:
        InputError: A file cannot be read, or there is less than a window of text.
    """
    training, held_out = [], []
    domains = recipe.data.training
    share = max(1, HELD_OUT_TOKENS // max(1, len(domains)) // length)
    for domain, source in domains.items():
        rest, kept = split(read_documents(source, recipe.folder), HELD_OUT, seed=recipe.seed)
        training.append(_full_windows(rest, tokenizer, length, recipe.seed))
        held_out.append(_full_windows(kept, tokenizer, length, recipe.seed)[:share])
        if not training[-1]:
            raise InputError(
                f"data.training.{domain}: less than the {length} tokens of a window",
                "Give more text, or a smaller student: length:.",
            )
    most = max(1, max_tokens // length)
    return DistillationTexts(_interleave(training, length)[:most], _interleave(held_out, length))


def _full_windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> list[list[int]]:
    if not any(documents):
        return []
    found = windows(documents, tokenizer, length, max_tokens=_TOKENISED, seed=seed)
    np.random.default_rng(seed).shuffle(found)
    return [window for window in found if len(window) == length]


def _interleave(domains: Sequence[list[list[int]]], length: int) -> NDArray[np.int64]:
    """One window of each domain after the other; those with more text go on alone."""
    turns = chain.from_iterable(zip_longest(*domains))
    return np.array([window for window in turns if window is not None], np.int64).reshape(-1, length)
