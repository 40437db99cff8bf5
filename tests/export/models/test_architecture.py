"""What is read from a model and its configuration."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny_model
from transformers import BloomConfig, Gemma2Config, GPT2Config, GPTNeoConfig, LlamaConfig, MistralConfig, Phi3Config

from edgemix.export.models.architecture import context_length, norm_epsilon, sliding_windows


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (GPT2Config(n_positions=512), 512),
        (BloomConfig(), 2048),
        (
            Phi3Config(
                max_position_embeddings=131072,
                original_max_position_embeddings=4096,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 48,
                    "long_factor": [2.0] * 48,
                    "original_max_position_embeddings": 4096,
                },
            ),
            4096,
        ),
    ],
)
def test_context_is_as_long_as_positions_stay_exact(config: object, context: int) -> None:
    assert context_length(config) == context


def test_sliding_windows_by_layer() -> None:
    assert sliding_windows(LlamaConfig(num_hidden_layers=2)) == (None, None)
    assert sliding_windows(MistralConfig(num_hidden_layers=2, sliding_window=64)) == (64, 64)
    assert sliding_windows(Gemma2Config(num_hidden_layers=3, sliding_window=32)) == (32, None, 32)
    assert sliding_windows(GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]])) == (None, 256)


def test_norm_epsilon_is_known_where_all_norms_agree() -> None:
    model = tiny_model("llama", rms_norm_eps=1e-4)
    assert norm_epsilon(model) == 1e-4
    model.add_module("other", torch.nn.LayerNorm(4, eps=1e-2))
    assert norm_epsilon(model) is None
