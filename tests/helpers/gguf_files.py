"""GGUF files of tiny models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from edgemix.export.models.location import Location
from helpers.tiny_models import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def in_8_bits(name, array):
    return gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0


def write_gguf(path, model, pack=in_8_bits):
    """A llama as llama.cpp stores it: queries and keys in its rotary order, matrices as `pack` makes them of a name and
    values: bytes and a type."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    # One token that transformers would add to a tokenizer of this kind.
    tokens += ["<|endoftext|>", *(f"<pad{i}>" for i in range(config.vocab_size))][: config.vocab_size - len(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") and t.endswith(">") else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }  # fmt: skip
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for part, count in heads.items():
            if part in name:
                array = array.reshape(count, 2, array.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(array.shape)
        ours = name
        for part, theirs in names.items():
            ours = ours.replace(part, theirs)
        if array.ndim == 2:
            packed, kind = pack(ours, np.ascontiguousarray(array))
            writer.add_tensor(ours, packed, raw_dtype=kind)
        else:
            writer.add_tensor(ours, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Array = np.ndarray


def pack(array: Array, kind: str) -> Array:
    """The bytes of a matrix; K-quants, which gguf-py only reads, are random."""
    if kind != "Q6_K":
        return gguf.quantize(array, Kind[kind])
    rng = np.random.default_rng(array.size)
    stored = rng.integers(0, 256, (len(array), array.shape[1] // 256, 210), dtype=np.uint8)
    stored[..., 192:208] = rng.integers(1, 30, stored[..., 192:208].shape)
    stored[..., 208:] = np.array([2e-4], np.float16).view(np.uint8)
    return stored.reshape(len(array), -1)


def write(folder: Path, kinds: Mapping[str, str], otherwise: str, **options: object) -> Location:
    """A tiny llama whose matrices have the kinds given by parts of their names.

    Its widths, 64 (two sums, filled up) and 256 (eight sums), are both ways to make sums of activations.
    """

    def packed(name: str, array: Array) -> tuple[Array, Kind]:
        kind = next((kind for part, kind in kinds.items() if part in name), otherwise)
        return pack(array, kind), Kind[kind]

    folder.mkdir(exist_ok=True)
    model = tiny_model("llama", **{"vocab_size": 300, "intermediate_size": 256, **options})
    write_gguf(folder / "tiny.gguf", model, packed)
    return Location(folder, "tiny.gguf", "tiny.gguf")
