"""Blocks found by the bytes of their rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemix.errors import EdgemixError
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.rtn import rtn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemix.export.quantization.algorithms.blocks import Blocks


def table_of(*all_blocks: Blocks) -> BlockTable:
    """A table that finds each of them by what it stands for."""
    table = BlockTable()
    for each in all_blocks:
        table.add(each.dequantized(), each)
    return table


def blocks(seed: int, bits: int = 4, rows: int = 6, *, symmetric: bool = False) -> Blocks:
    weight = np.random.default_rng(seed).standard_normal((rows, 40)).astype(np.float32)
    return rtn(weight, bits=bits, block=16, symmetric=symmetric)


def with_sums(seed: int) -> Blocks:
    """4-bit blocks with columns for the sums of theirs."""
    weight = np.random.default_rng(seed).standard_normal((6, 48)).astype(np.float32)
    some = rtn(weight, bits=4, block=16, symmetric=False)
    behind = rtn(weight[:, :3] / 20, bits=4, block=16, symmetric=False)
    stored = {
        kind: np.concatenate([getattr(some, kind), getattr(behind, kind)], axis=1)
        for kind in ("codes", "scales", "zero_points")
    }
    return replace(some, **stored, sums=3)


def same(a: Blocks, b: Blocks) -> bool:
    return (a.bits, a.columns, a.sums) == (b.bits, b.columns, b.sums) and np.array_equal(
        a.dequantized(), b.dequantized()
    )


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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (blocks(0), blocks(1, bits=8, symmetric=True)),
        (blocks(0), blocks(1, bits=8)),
        (blocks(0, symmetric=True), blocks(1, bits=8, symmetric=True)),
        (blocks(0, symmetric=True), blocks(1)),
    ],
)
def test_what_was_quantised_in_different_ways_is_joined_exactly(first: Blocks, second: Blocks) -> None:
    order = np.random.default_rng(2).permutation(12)
    mixed = np.concatenate([first.dequantized(), second.dequantized()])[order]
    found = table_of(first, second).find(mixed)
    assert found is not None
    assert found.bits == max(first.bits, second.bits)
    np.testing.assert_array_equal(found.dequantized(), mixed)


@pytest.mark.parametrize("symmetric", [True, False])
def test_widening_is_exact(symmetric: bool) -> None:
    narrow = blocks(0, symmetric=symmetric)
    wide = narrow.widened()
    assert wide.bits == 8
    assert wide.zero_points is None
    assert wide.widened() is wide
    np.testing.assert_array_equal(wide.dequantized(), narrow.dequantized())


def test_a_sum_weighs_all_inputs_of_its_block() -> None:
    some = with_sums(0)
    plain = replace(
        some, codes=some.codes[:, :3], scales=some.scales[:, :3], zero_points=some.zero_points[:, :3], sums=0
    )
    rest = (some.codes[:, 3, :3].astype(np.float32) - some.zero_points[:, 3:]) * some.scales[:, 3:].astype(np.float32)
    expected = plain.dequantized() + np.repeat(rest, 16, axis=1)
    np.testing.assert_array_equal(some.dequantized(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_with_and_without_sums_are_joined_exactly(bits: int) -> None:
    weight = np.random.default_rng(1).standard_normal((4, 48)).astype(np.float32)
    first, second = with_sums(0), rtn(weight, bits=bits, block=16, symmetric=True)
    mixed = np.concatenate([second.dequantized(), first.dequantized()])
    found = table_of(first, second).find(mixed)
    assert found is not None
    assert (found.bits, found.sums) == (bits, 3)
    np.testing.assert_array_equal(found.dequantized(), mixed)


def test_rows_may_be_equal() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    weight[4] = weight[1]
    some = rtn(weight, bits=4, block=16, symmetric=False)
    found = table_of(some).find(some.dequantized()[::-1])
    assert found is not None
    np.testing.assert_array_equal(found.dequantized(), some.dequantized()[::-1])


def test_a_matrix_that_is_only_partly_known_is_not() -> None:
    known = blocks(0)
    table = table_of(known)
    assert table.find(np.concatenate([known.dequantized(), np.ones((1, 40), np.float32)])) is None


def test_blocks_of_different_sizes_cannot_be_joined() -> None:
    one = blocks(0)
    other = rtn(one.dequantized() + 1, bits=4, block=32, symmetric=True)
    with pytest.raises(EdgemixError, match="different sizes"):
        table_of(one, other).find(np.concatenate([one.dequantized(), other.dequantized()]))


@pytest.mark.parametrize("wide_first", [True, False])
def test_a_row_of_zeros_in_an_8_bit_matrix_widens_no_other(wide_first: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    weight[3] = 0
    narrow = rtn(weight, bits=4, block=16, symmetric=False)
    wide = rtn(weight * 2, bits=8, block=16, symmetric=True)
    table = table_of(*((wide, narrow) if wide_first else (narrow, wide)))
    turned = table.find(narrow.dequantized()[::-1])
    assert turned is not None
    assert turned.bits == 4
    assert table.find(wide.dequantized()) is wide


@pytest.mark.parametrize("make", [blocks, partial(blocks, bits=8, symmetric=True), with_sums])
def test_a_table_comes_back_from_disk(make: Callable[[int], Blocks], tmp_path: Path) -> None:
    table = table_of(make(0), make(1))
    table.save(tmp_path / "blocks.safetensors")
    loaded = BlockTable.load(tmp_path / "blocks.safetensors")
    assert len(loaded) == 2
    for seed in (0, 1):
        found = loaded.find(make(seed).dequantized())
        assert found is not None
        assert same(found, make(seed))
