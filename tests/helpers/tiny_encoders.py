"""Tiny random encoders of transformers, by architecture."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

VOCABULARY = 120
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 80}
_DECODER = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}

CONFIGS: dict[str, Any] = {
    "bert": lambda: hf.BertConfig(**_ENCODER),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=80
    ),
    "roberta": lambda: hf.RobertaConfig(**_ENCODER, pad_token_id=1),
    "xlm-roberta": lambda: hf.XLMRobertaConfig(**_ENCODER, pad_token_id=1),
    "electra": lambda: hf.ElectraConfig(**_ENCODER, embedding_size=16),
    "deberta-v2": lambda: hf.DebertaV2Config(
        **_ENCODER,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    ),
    "albert": lambda: hf.AlbertConfig(**_ENCODER, embedding_size=16),
    "xlnet": lambda: hf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "modernbert": lambda: hf.ModernBertConfig(
        **_ENCODER, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, reference_compile=False
    ),
    "mpnet": lambda: hf.MPNetConfig(**_ENCODER, pad_token_id=1),
    "llama": lambda: hf.LlamaConfig(**_DECODER),
    "qwen2": lambda: hf.Qwen2Config(**_DECODER),
}


def tiny_encoder(
    kind: str, head: str = "SequenceClassification", labels: int = 3, seed: int = 0, **settings: Any
) -> Any:
    """A random model of transformers with a head: SequenceClassification, TokenClassification or MaskedLM."""
    config = CONFIGS[kind]()
    config.num_labels = labels
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = getattr(hf, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.float().eval()
