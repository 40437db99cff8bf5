"""What usually follows what in training text."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemix.bundle.ngram_table import LONGEST, ROW, NgramTable
from edgemix.errors import BundleError
from edgemix.export.drafting.ngrams import count_ngrams

if TYPE_CHECKING:
    from pathlib import Path

LEAST, SHARE = 3, 0.1


def counted_slowly(texts: list[list[int]]) -> dict[tuple[int, ...], tuple[int, float]]:
    """Every n-gram that tells something -> what follows it most often, and in what share of cases."""
    seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for length in range(1, LONGEST + 1):
            for end in range(length, len(text)):
                seen[tuple(text[end - length : end])][text[end]] += 1
    found = {}
    for gram, counts in seen.items():
        token = min(counts, key=lambda token: (-counts[token], token))
        share = counts[token] / (counts.total() + 1)
        if counts[token] >= LEAST and share > SHARE:
            found[gram] = (token, share)
    return found


def guess_slowly(known: dict[tuple[int, ...], tuple[int, float]], text: list[int]) -> tuple[int, float] | None:
    ends = (tuple(text[-length:]) for length in range(min(LONGEST, len(text)), 0, -1))
    return next((known[end] for end in ends if end in known), None)


@pytest.fixture
def texts() -> list[list[int]]:
    """Texts of a Markov chain in which some tokens determine the next one, and some do not."""
    generator = np.random.default_rng(0)
    rows = generator.dirichlet(np.full(12, 0.15), 12)
    texts = []
    for length in generator.integers(1, 200, 20):
        text = [int(generator.integers(12))]
        while len(text) < length:
            text.append(int(generator.choice(12, p=rows[(text[-1] + text[-2 % len(text)]) % 12])))
        texts.append(text)
    return texts


def test_ngrams_equal_a_plain_count(texts: list[list[int]]) -> None:
    """The longest one that is known says it; those that say no more than a shorter one are left out."""
    known, table = counted_slowly(texts), count_ngrams(texts, 10**6)
    assert 100 < len(table) < 0.8 * len(known)
    told = 0
    for text in texts:
        for end in range(len(text) + 1):
            expected, found = guess_slowly(known, text[:end]), table.guess(text[:end])
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert found.token == expected[0]
                assert found.share == pytest.approx(expected[1], abs=0.155)
                told += 1
    assert told > 1000


def test_no_ngram_spans_two_texts() -> None:
    table = count_ngrams([[1, 2, 3]] * 5, 100)
    assert table.guess([3]) is None
    assert table.guess([1, 2]) == (3, pytest.approx(5 / 6, abs=1 / 255))
    assert len(count_ngrams([[1], [2], [3]] * 5, 100)) == 0
    for few in range(1, 7):
        assert len(count_ngrams([list(range(few))], 100)) == 0, "nothing comes often"


def test_the_most_frequent_ones_are_kept() -> None:
    texts = [[1, 2]] * 9 + [[3, 4]] * 5 + [[5, 6]] * 7
    table = count_ngrams(texts, 2)
    assert [table.guess([token]) is not None for token in (1, 3, 5)] == [True, False, True]


def test_a_table_is_read_from_its_file(texts: list[list[int]], tmp_path: Path) -> None:
    table, path = count_ngrams(texts, 10**6), tmp_path / "ngrams.bin"
    path.write_bytes(table.to_bytes())
    assert path.stat().st_size == ROW * len(table)
    opened = NgramTable.open(path, len(table), 12)
    assert len(opened) == len(table)
    assert [opened.guess(text) for text in texts] == [table.guess(text) for text in texts]
    with pytest.raises(BundleError, match="token beyond the 11"):
        NgramTable.open(path, len(table), 11)
    with pytest.raises(BundleError, match="and should have"):
        NgramTable.open(path, len(table) + 1, 12)


def test_tokens_of_large_vocabularies_have_distinct_keys() -> None:
    high = (1 << 24) - 1
    table = count_ngrams([[high, high, 7], [high - 1, high, 9]] * 4, 100)
    assert table.guess([high, high]) == (7, pytest.approx(4 / 5, abs=1 / 255))
    assert table.guess([high - 1, high]) == (9, pytest.approx(4 / 5, abs=1 / 255))
