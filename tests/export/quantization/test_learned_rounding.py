"""Trained roundings and scales: better than rounding, repeatable, resumable, and found again in the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.trained_linears import BITS, BLOCK, divergence, matrices, text, trained

from edgemix.export.quantization.algorithms.learned_rounding import learn_rounding
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.training.checkpoints import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgemix.export.quantization.algorithms.block_table import BlockTable


def dequantized(model: PreTrainedModel, table: BlockTable) -> dict[str, np.ndarray]:
    found = {}
    for name, matrix in matrices(model).items():
        blocks = table.find(matrix)
        assert blocks is not None
        assert blocks.bits == BITS
        found[name] = blocks.dequantized()
    return found


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_training_beats_rounding(name: str) -> None:
    model = trained(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = learn_rounding(model, text(1, 256), block=BLOCK, steps=40)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rounded = {
        key: rtn(matrix, bits=BITS, block=BLOCK, symmetric=False).dequantized()
        for key, matrix in matrices(model).items()
    }
    assert divergence(model, dequantized(model, table)) < 0.6 * divergence(model, rounded)


def test_an_interrupted_run_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("qwen2")
    whole = learn_rounding(model, text(1, 64), steps=6)
    checkpoint = Checkpoint(tmp_path / "state", "key")
    monkeypatch.setattr(type(model.base_model), "forward", interrupting(type(model.base_model).forward, 7))
    with pytest.raises(KeyboardInterrupt):
        learn_rounding(model, text(1, 64), steps=6, checkpoint=checkpoint)
    monkeypatch.undo()
    resumed = learn_rounding(model, text(1, 64), steps=6, checkpoint=checkpoint)
    for key, weight in dequantized(model, whole).items():
        np.testing.assert_array_equal(dequantized(model, resumed)[key], weight)


def interrupting(forward, after: int):
    """Ctrl-C in a later call."""
    calls = 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    return call
