"""Blocks found by the bytes of their rows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemix.errors import EdgemixError
from edgemix.export.quantization.block_table import BlockTable
from edgemix.export.quantization.rtn import rtn

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.export.quantization.blocks import Blocks


def table_of(*all_blocks: Blocks) -> BlockTable:
    """A table that finds each of them by what it stands for."""
    table = BlockTable()
    for each in all_blocks:
        table.add(each.dequantized(), each)
    return table


def blocks(seed: int, bits: int = 4, rows: int = 6, *, symmetric: bool = False) -> Blocks:
    weight = np.random.default_rng(seed).standard_normal((rows, 40)).astype(np.float32)
    return rtn(weight, bits=bits, block=16, symmetric=symmetric)


def same(a: Blocks, b: Blocks) -> bool:
    return a.bits == b.bits and a.columns == b.columns and np.array_equal(a.dequantized(), b.dequantized())


def test_a_matrix_finds_its_blocks() -> None:
    one, other = blocks(0), blocks(1, bits=8, symmetric=True)
    table = table_of(one, other)
    assert table.find(one.dequantized()) is one
    assert table.find(other.dequantized()) is other
    assert table.find(one.dequantized() + 1) is None


def test_joined_and_split_matrices_find_theirs() -> None:
    one, other = blocks(0), blocks(1)
    table = table_of(one, other)
    joined = np.concatenate([one.dequantized(), other.dequantized()])
    found = table.find(joined)
    assert found is not None
    np.testing.assert_array_equal(found.dequantized(), joined)
    part = table.find(one.dequantized()[2:5])
    assert part is not None
    np.testing.assert_array_equal(part.codes, one.codes[2:5])


def test_what_was_quantised_in_different_ways_cannot_be_joined() -> None:
    one, other = blocks(0), blocks(1, bits=8)
    table = table_of(one, other)
    strange = np.ones((1, 40), np.float32)
    for second in (other.dequantized(), strange):
        with pytest.raises(EdgemixError, match="different ways"):
            table.find(np.concatenate([one.dequantized(), second]))


@pytest.mark.parametrize("make", [blocks, partial(blocks, bits=8, symmetric=True)])
def test_a_table_comes_back_from_disk(make: partial[Blocks], tmp_path: Path) -> None:
    table = table_of(make(0), make(1))
    table.save(tmp_path / "blocks.safetensors")
    loaded = BlockTable.load(tmp_path / "blocks.safetensors")
    assert len(loaded) == 2
    for seed in (0, 1):
        found = loaded.find(make(seed).dequantized())
        assert found is not None
        assert same(found, make(seed))
