"""The student's text: windows of the recipe's training text, with the domains interleaved, and a held-out part.

Windows are shuffled within each domain: in document order, a short training would read only three or four documents.
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
"""Fraction of each domain's training text that is held out for validation."""
HELD_OUT_TOKENS = 8_192
"""Largest number of held-out tokens over all domains."""
_MAX_DOMAIN_TOKENS = 20_000_000
"""Largest number of tokens of a domain's text from which windows are taken."""


@dataclass(frozen=True)
class DistillationTexts:
    """Training and held-out windows, int64 [windows, length]; they share no piece of text.

    Every prefix of either has about the same amount of each domain, in an order that depends only on the seed.
    """

    training: NDArray[np.int64]
    held_out: NDArray[np.int64]


def read_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int) -> DistillationTexts:
    """Read a recipe's training text.

    Args:
        recipe: A recipe with `data.training`.
        tokenizer: The members' tokenizer.
        length: Tokens per window.
        max_tokens: Largest number of training tokens to return.

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
    count = max(1, max_tokens // length)
    return DistillationTexts(_interleave(training, length)[:count], _interleave(held_out, length))


def _full_windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> list[list[int]]:
    if not any(documents):
        return []
    found = windows(documents, tokenizer, length, max_tokens=_MAX_DOMAIN_TOKENS, seed=seed)
    np.random.default_rng(seed).shuffle(found)
    return [window for window in found if len(window) == length]


def _interleave(domains: Sequence[list[list[int]]], length: int) -> NDArray[np.int64]:
    """Return one window of each domain in turn, int64 [windows, length]; longer domains continue alone."""
    turns = chain.from_iterable(zip_longest(*domains))
    return np.array([window for window in turns if window is not None], np.int64).reshape(-1, length)
