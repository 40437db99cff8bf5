"""A tiny trained model, and the divergence that other weights of its linears make."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemix.export.training.loop import TrainingBudget, train
from edgemix.export.training.token_loss import token_loss
from helpers.tiny_models import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
