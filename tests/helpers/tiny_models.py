"""Tiny random Hugging Face models of many architectures, for tests of exporters: two layers, a small vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Options under the names that most configurations share."""

_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-head-20": ("llama", {"hidden_size": 80}),
    "gpt2": ("gpt2", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 24}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 2, "rotary_pct": 0.5}),
    "stablelm": ("stablelm", {"hidden_size": 128, "partial_rotary_factor": 0.5}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}
"""Test name -> model type and the options that differ from `_COMMON`."""


def tiny_model(name: str, **options: Any) -> PreTrainedModel:
    """A random fp32 model in evaluation mode, the same at every call.

    Args:
        name: A key of the table above, or any model type that transformers knows.
        options: Configuration options that replace the table's.
    """
    model_type, differing = _ARCHITECTURES.get(name, (name, {}))
    config_class = CONFIG_MAPPING[model_type]
    common = {
        key: value for key, value in _COMMON.items() if hasattr(config_class, key) or key in config_class.attribute_map
    }
    config = config_class(**{**common, **differing, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    # Fresh models have zero biases, unit norms and nearly flat outputs, behind which a wrong graph could hide.
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.12
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def tiny_tokenizer(merges=(("a", "b"),), bos=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
