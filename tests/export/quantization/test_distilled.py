"""Trained roundings and scales: better than rounding, repeatable, resumable, and found again in the graph."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model

from edgemix.export.quantization.algorithms.learned_rounding import distill_blocks
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.training.checkpoints import Checkpoint
from edgemix.export.training.loop import TrainingBudget, train
from edgemix.export.training.token_loss import token_loss

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgemix.export.quantization.algorithms.block_table import BlockTable

LENGTH = 32
BITS, BLOCK = 4, 32


def text(seed: int, count: int) -> np.ndarray:
    """Windows in which every token follows from the two before it, but for some noise."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 160, (count, LENGTH))
    for place in range(2, LENGTH):
        follows = 3 + (ids[:, place - 1] * 3 + ids[:, place - 2]) % 37
        ids[:, place] = np.where(rng.random(count) < 0.9, follows, ids[:, place])
    return ids


@cache
def trained(name: str) -> PreTrainedModel:
    model = tiny_model(name)
    model.requires_grad_(True)
    train(
        token_loss(model),
        dict(model.named_parameters()),
        text(0, 512),
        budget=TrainingBudget(40),
        batch=8,
        learning_rate=5e-3,
    )
    return model.requires_grad_(False)


def matrices(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights [N, K] of the linears but the head."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings():
            weight = module.weight.detach()
            found[name] = np.ascontiguousarray(weight.T if type(module).__name__ == "Conv1D" else weight)
    return found


def divergence(model: PreTrainedModel, weights: dict[str, np.ndarray]) -> float:
    """Mean KL of the model with other weights from the model, on text that nothing was trained on."""
    ids = torch.from_numpy(text(9, 32))
    expected = model(input_ids=ids).logits.log_softmax(-1)
    before = {name: module.weight.detach().clone() for name, module in model.named_modules() if name in weights}
    for name, weight in weights.items():
        module = model.get_submodule(name)
        value = torch.from_numpy(weight)
        module.weight.copy_(value.T if type(module).__name__ == "Conv1D" else value)
    found = model(input_ids=ids).logits.log_softmax(-1)
    for name, weight in before.items():
        model.get_submodule(name).weight.copy_(weight)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


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
    table = distill_blocks(model, text(1, 256), block=BLOCK, steps=40)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rounded = {
        key: rtn(matrix, bits=BITS, block=BLOCK, symmetric=False).dequantized()
        for key, matrix in matrices(model).items()
    }
    assert divergence(model, dequantized(model, table)) < 0.6 * divergence(model, rounded)


def test_an_interrupted_run_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("qwen2")
    whole = distill_blocks(model, text(1, 64), steps=6)
    checkpoint = Checkpoint(tmp_path / "state", "key")
    monkeypatch.setattr(type(model.base_model), "forward", interrupting(type(model.base_model).forward, 7))
    with pytest.raises(KeyboardInterrupt):
        distill_blocks(model, text(1, 64), steps=6, checkpoint=checkpoint)
    monkeypatch.undo()
    resumed = distill_blocks(model, text(1, 64), steps=6, checkpoint=checkpoint)
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
