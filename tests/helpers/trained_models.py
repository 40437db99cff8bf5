"""A small language model trained in seconds on text that it needs all of its parts for."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgemix.export.training.loop import TrainingBudget, train
from edgemix.export.training.token_loss import token_loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

LENGTH = 32


def text(seed: int, windows: int) -> NDArray[np.int64]:
    """Windows in one of four languages, which the first token names: in each, a token decides on the next, but for
    noise. A model must remember four tables and look back to the first token.
    """
    tables = np.random.default_rng(7)
    follows = np.stack([tables.permutation(64) for _ in range(4)])
    generator = np.random.default_rng(seed)
    language = generator.integers(0, 4, windows)
    ids = np.zeros((windows, LENGTH), np.int64)
    ids[:, 0], ids[:, 1] = 60 + language, generator.integers(0, 60, windows)
    for place in range(2, LENGTH):
        regular = generator.random(windows) < 0.85
        ids[:, place] = np.where(regular, follows[language, ids[:, place - 1]], generator.integers(0, 64, windows))
    return ids


def trained() -> LlamaForCausalLM:
    """A Llama with four layers, frozen, in evaluation mode."""
    return copy.deepcopy(_trained())


@cache
def _trained() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    parameters = dict(model.named_parameters())
    train(token_loss(model), parameters, text(1, 2000), budget=TrainingBudget(120), batch=32, learning_rate=4e-3)
    return model.eval().requires_grad_(False)
