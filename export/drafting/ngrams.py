"""Count the n-grams of a recipe's training text that predict the next token, for drafts without a call of a model.

Measured on mixtures of SmolLM2-135M's experts: where prompt lookup matches at most one token, n-grams are right at 25%
to 40% of the positions, and a further token in a verifying call takes a sixteenth of a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgemix.bundle.manifest import NGRAMS
from edgemix.bundle.ngram_table import LONGEST, NgramTable, longer
from edgemix.bundle.stages import stage_key
from edgemix.export.data.text import windows
from edgemix.export.models.tokenizers import tokenizer_json
from edgemix.files import write_atomically
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Self

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from edgemix.export.context import ExportContext
    from edgemix.progress import Progress
    from edgemix.recipe.schema import Recipe

COUNTED, _LENGTH = 4_000_000, 512
"""Largest number of counted tokens, and tokens of a chunk."""
_DOMAIN_TOKENS = 1_000_000
"""Largest number of counted tokens of one domain."""
_MIN_COUNT, _MIN_SHARE = 3, 0.1
"""Smallest count and share of an n-gram's most frequent next token."""
_SHARE_MARGIN = 0.15
"""A longer n-gram is left out if a shorter one predicts the same token with a share that differs by at most this."""


def write_ngrams(context: ExportContext, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the n-grams of a recipe's training text, and write them to its bundle.

    Args:
        context: The export; its recipe names the text and the largest number of n-grams.
        tokenizer: The tokenizer for the text.

    Returns:
        Number of n-grams; 0 without text, without frequent n-grams, or where the recipe wants none.

    Raises:
        InputError: A text cannot be read.
        EdgemixError: The file cannot be written.
    """
    recipe, path = context.recipe, context.writer.folder / NGRAMS
    sources = recipe.data.training
    if not sources or not recipe.ngrams:
        path.unlink(missing_ok=True)  # left by an interrupted run
        return 0
    texts = {domain: read_documents(source, recipe.folder) for domain, source in sources.items()}

    def make() -> int:
        path.unlink(missing_ok=True)
        table = _count_texts(recipe, texts, tokenizer, context.progress)
        if len(table):
            write_atomically(path, table.to_bytes())
        return len(table)

    key = stage_key(texts=texts, tokenizer=tokenizer_json(tokenizer), most=recipe.ngrams, seed=recipe.seed)
    return context.stage("ngrams", key, make, int, files=[path])


def _count_texts(
    recipe: Recipe, texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> NgramTable:
    most = min(_DOMAIN_TOKENS, COUNTED // len(texts))
    read: list[list[int]] = []
    with progress.stage("n-grams", len(texts)) as task:
        for domain, documents in texts.items():
            read += windows(documents, tokenizer, _LENGTH, max_tokens=most, seed=recipe.seed)
            task.advance(note=domain)
        return count_ngrams(read, recipe.ngrams)


def count_ngrams(texts: Iterable[Sequence[int]], most: int) -> NgramTable:
    """Count the n-grams of up to `LONGEST` tokens that predict the next token; the most frequent ones are kept.

    Args:
        texts: Token ids; no n-gram spans two texts.
        most: Largest number of n-grams.
    """
    arrays = [np.asarray(text, np.int64) for text in texts]
    ids = np.concatenate(arrays)
    before = np.concatenate([np.arange(len(text)) for text in arrays])  # tokens of the same text before each
    keys: list[NDArray[np.uint64]] = [np.zeros(len(ids) - 1, np.uint64)]  # of what ends at each place but the last
    found = _Entries.none()
    for length in range(1, min(LONGEST, len(ids) - 1) + 1):
        one = keys[-1].copy()
        one[length - 1 :] = longer(one[length - 1 :], ids[: len(ids) - length])
        places = np.flatnonzero((before[:-1] >= length - 1) & (before[1:] > 0))
        entries = _predictive(one[places], ids[places + 1], places)
        found = found.merge(entries.take(~_redundant(entries, found, keys[1:])))
        keys.append(one)
    chosen = found.take(np.argsort(-found.counts, kind="stable")[:most])
    chosen = chosen.take(np.argsort(chosen.keys))
    return NgramTable(chosen.keys, chosen.tokens.astype(np.uint32), np.round(chosen.shares * 255).astype(np.uint8))


class _Entries(NamedTuple):
    """n-grams in the order of their keys, with the most frequent next token of each.

    Attributes:
        keys: uint64 [n-grams].
        tokens: int64, the next token.
        counts: int64, occurrences with that next token.
        shares: float64, their share of all occurrences, with one more occurrence assumed that had another next token.
        places: int64, a position at which the n-gram ends.
    """

    keys: NDArray[Any]
    tokens: NDArray[Any]
    counts: NDArray[Any]
    shares: NDArray[Any]
    places: NDArray[Any]

    @classmethod
    def none(cls) -> Self:
        whole = np.empty(0, np.int64)
        return cls(np.empty(0, np.uint64), whole, whole, np.empty(0), whole)

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Self:
        return type(self)(*(column[which] for column in self))

    def merge(self, others: Self) -> Self:
        columns = (np.concatenate(pair) for pair in zip(self, others, strict=True))
        return type(self)(*columns).take(np.argsort(np.concatenate((self.keys, others.keys))))


def _predictive(keys: NDArray[np.uint64], following: NDArray[np.int64], places: NDArray[np.int64]) -> _Entries:
    """Return the n-grams with a next token that is frequent and likely enough, from all occurrences by key."""
    if not len(keys):
        return _Entries.none()
    order = np.lexsort((following, keys))
    keys, following, places = keys[order], following[order], places[order]
    fresh = np.append(True, keys[1:] != keys[:-1])
    begins = np.flatnonzero(fresh | np.append(True, following[1:] != following[:-1]))
    counts = np.diff(begins, append=len(keys))
    group = np.cumsum(fresh)[begins] - 1
    totals = np.bincount(group, counts)
    best = np.lexsort((-counts, group))  # of each group the most frequent first
    best = best[np.append(True, group[best][1:] != group[best][:-1])]
    at = begins[best]
    entries = _Entries(keys[at], following[at], counts[best], counts[best] / (totals + 1), places[at])
    return entries.take((entries.counts >= _MIN_COUNT) & (entries.shares > _MIN_SHARE))


def _redundant(entries: _Entries, shorter: _Entries, keys: Sequence[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """Return which n-grams predict the same as the longest known shorter one at their end: bool [n-grams].

    Args:
        entries: n-grams of one length.
        shorter: All known shorter n-grams.
        keys: For each shorter length, the key of the n-gram that ends at each position.
    """
    redundant, unknown = np.zeros(len(entries.keys), bool), np.ones(len(entries.keys), bool)
    for own in reversed(keys) if len(shorter.keys) else ():
        ends = own[entries.places]
        at = np.minimum(np.searchsorted(shorter.keys, ends), len(shorter.keys) - 1)
        hit = unknown & (shorter.keys[at] == ends)
        alike = np.abs(shorter.shares[at] - entries.shares) <= _SHARE_MARGIN
        redundant |= hit & alike & (shorter.tokens[at] == entries.tokens)
        unknown &= ~hit
    return redundant
