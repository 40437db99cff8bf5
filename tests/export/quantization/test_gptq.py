"""GPTQ: less error in the outputs than rounding, on the same blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemix.export.quantization.algorithms.gptq import DAMPING, gptq
from edgemix.export.quantization.algorithms.rtn import rtn

if TYPE_CHECKING:
    from edgemix.export.quantization.algorithms.blocks import Blocks

GENERATOR = np.random.default_rng(0)


def inputs(tokens: int, columns: int) -> np.ndarray:
    """Correlated, with channels of different sizes."""
    mixing = GENERATOR.normal(size=(columns, columns)) / np.sqrt(columns) + np.eye(columns)
    sizes = np.exp(GENERATOR.normal(size=columns))
    return (GENERATOR.normal(size=(tokens, columns)) @ mixing * sizes).astype(np.float32)


def weights(rows: int, columns: int) -> np.ndarray:
    return GENERATOR.normal(size=(rows, columns)).astype(np.float32)


def hessian(x: np.ndarray) -> np.ndarray:
    return 2 / len(x) * x.T @ x


def error(weight: np.ndarray, blocks: Blocks, x: np.ndarray) -> float:
    return float((((weight - blocks.dequantized()) @ x.T) ** 2).sum())


def objective(difference: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What GPTQ minimizes, [N]: each row's squared error of outputs, with the damped Hessian."""
    damped = hessian(x) + DAMPING * hessian(x).diagonal().mean() * np.eye(x.shape[1])
    return ((difference @ damped) * difference).sum(1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "block"), [(128, 32), (96, 128), (200, 64)])
def test_outputs_are_better_than_rounded_ones_on_other_text(bits: int, columns: int, block: int) -> None:
    x, weight = inputs(3000, columns), weights(80, columns)
    blocks = gptq(weight, hessian(x[:2000]), bits=bits, block=block)
    rounded = rtn(weight, bits=bits, block=block, symmetric=False)
    assert error(weight, blocks, x[2000:]) < 0.6 * error(weight, rounded, x[2000:])


def test_refinement_lowers_the_error() -> None:
    x, weight = inputs(2000, 160), weights(64, 160)
    blocks = [gptq(weight, hessian(x), bits=4, block=32, sweeps=n) for n in (0, 1, 4)]
    errors = [objective(weight - each.dequantized(), x).sum() for each in blocks]
    assert errors[0] > 1.05 * errors[1] > 1.05 * errors[2]


def test_with_independent_inputs_it_is_rounding_on_its_own_scales() -> None:
    weight = weights(32, 128)
    blocks = gptq(weight, np.eye(128, dtype=np.float32), bits=4, block=32, sweeps=0)
    assert blocks.zero_points is not None
    scales, zero = blocks.scales[..., None].astype(np.float32), blocks.zero_points[..., None]
    nearest = np.clip(np.rint(weight.reshape(32, 4, 32) / scales + zero), 0, 15)
    assert np.array_equal(blocks.codes, nearest)
    rounded = rtn(weight, bits=4, block=32, symmetric=False)
    assert error(weight, blocks, np.eye(128)) < error(weight, rounded, np.eye(128))


def test_the_layout_of_blocks() -> None:
    weight = weights(20, 50)
    blocks = gptq(weight, hessian(inputs(500, 50)), bits=4, block=32)
    assert blocks.codes.shape == (20, 2, 32)
    assert blocks.codes.dtype == np.uint8
    assert blocks.codes.max() <= 15
    assert blocks.scales.dtype == np.float16
    assert np.isfinite(blocks.scales).all()
    assert (blocks.scales > 0).all()
    assert blocks.zero_points is not None
    assert blocks.zero_points.max() <= 15
    padding = blocks.codes[:, 1, 18:]
    assert np.array_equal(padding, np.broadcast_to(blocks.zero_points[:, 1:], padding.shape))
    assert blocks.dequantized().shape == weight.shape


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    x, weight = inputs(600, 64), weights(24, 64)
    x[:, 5:40] = 0
    blocks = gptq(weight, hessian(x), bits=8, block=32)
    np.testing.assert_allclose(blocks.dequantized()[:, 5:32], weight[:, 5:32], atol=0.05)
    nothing = gptq(weight, np.zeros((64, 64), np.float32), bits=8, block=32)
    np.testing.assert_allclose(nothing.dequantized(), weight, atol=0.05)


def test_fewer_tokens_than_inputs_and_columns_that_are_the_same() -> None:
    x, weight = inputs(10, 96), weights(16, 96)
    x[:, 50] = x[:, 51]
    blocks = gptq(weight, hessian(x), bits=4, block=32)
    assert error(weight, blocks, x) < error(weight, rtn(weight, bits=4, block=32, symmetric=False), x)


def test_zero_weights_stay_zero() -> None:
    weight = weights(8, 64)
    weight[3], weight[:, 32:] = 0, 0
    blocks = gptq(weight, hessian(inputs(300, 64)), bits=4, block=32)
    assert not blocks.dequantized()[3].any()
    assert not blocks.dequantized()[:, 32:].any()


def test_refined_blocks_are_a_minimum() -> None:
    """No single code and no single scale can be changed for the better."""
    x, weight = inputs(500, 64), weights(6, 64)
    blocks = gptq(weight, hessian(x), bits=4, block=16, sweeps=60)
    scales = blocks.scales[..., None].astype(np.float64)
    lost = weight - blocks.dequantized().astype(np.float64)
    least = objective(lost, x)
    for column in range(64):
        for step in (-1, 1):
            possible = np.isin(blocks.codes[:, column // 16, column % 16].astype(int) + step, range(16))
            moved = lost.copy()
            moved[:, column] -= step * scales[:, column // 16, 0]
            assert (objective(moved, x) > 0.9999 * least)[possible].all()
    for start in range(0, 64, 16):
        for factor in (-0.003, 0.003):
            moved = lost.copy()
            moved[:, start : start + 16] -= factor * blocks.dequantized()[:, start : start + 16]
            assert (objective(moved, x) > 0.9999 * least).all()
