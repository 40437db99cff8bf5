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


_ROTARY_PAIRS = frozenset({"llama"})
"""Architectures whose queries and keys llama.cpp stores with neighbors rotated together."""


def write_gguf(path, model, pack=in_8_bits, *, metadata=None, tensors=None, tokens=()):
    """A file as llama.cpp's converter writes it, for a model with the tokenizer of `tiny_tokenizer`.

    Args:
        path: The file.
        model: The model.
        pack: Makes bytes and a type of a matrix's name and values.
        metadata: Keys that are added or, if None, left out; those of the model without its architecture.
        tensors: Tensors that are added or, if None, left out.
        tokens: Tokens of the vocabulary after those of `tiny_tokenizer`; control tokens if they look like <this>.
    """
    renamed = {"gemma3_text": "gemma3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
    architecture = renamed.get(model.config.model_type, model.config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    entries = _model_entries(model.config) | _tokenizer_entries(model.config.vocab_size, tokens)
    for key, value in (entries | (metadata or {})).items():
        if value is not None:
            known = key.startswith(("general.", "tokenizer.", "split."))
            _add(writer, key if known else f"{architecture}.{key}", value)
    for name, array in (dict(_named(model, architecture)) | (tensors or {})).items():
        if array is None:
            continue
        if array.ndim == 2:
            packed, kind = pack(name, np.ascontiguousarray(array))
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_they_are(name, array):
    return array.astype(np.float32), gguf.GGMLQuantizationType.F32


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _model_entries(config):
    entries = {
        "general.license": "mit",
        "context_length": getattr(config, "max_position_embeddings", 256),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "vocab_size": config.vocab_size,
    }
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, name):
            entries["attention.layer_norm_epsilon"] = getattr(config, name)
    if hasattr(config, "rope_parameters"):
        entries["rope.freq_base"] = 10_000.0
    return entries


def _tokenizer_entries(size, tokens):
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = sorted(backend["vocab"], key=backend["vocab"].get)
    vocabulary += [*tokens, *(f"<pad{i}>" for i in range(size))][: size - len(vocabulary)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if t.startswith("<") and t.endswith(">") else 1 for t in vocabulary],
        "tokenizer.ggml.merges": [" ".join(m) for m in backend["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _named(model, architecture):
    """Names and values of the tensors as the converter writes them."""
    config = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    for name, tensor in model.named_parameters():
        array = tensor.detach().numpy()
        for part, count in heads.items():
            if part in name and architecture in _ROTARY_PAIRS:
                array = array.reshape(count, 2, array.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
            array = array + 1
        if architecture == "bloom" and "query_key_value" in name:
            array = np.moveaxis(array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:]), 1, 0)
            array = array.reshape(-1, *array.shape[3:])
        if name.endswith("shared_expert_gate.weight"):
            array = array.reshape(-1)
        if architecture == "gpt2" and array.ndim == 2 and ".h." in name:
            array = array.T
        if name.endswith("experts.gate_up_proj"):
            for half, part in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                yield f"{names.get_name(name.replace('gate_up', half))}.weight", part
        else:
            spellings = (name, name.removeprefix("transformer."))
            known = next(filter(None, (names.get_name(each, (".weight", ".bias")) for each in spellings)))
            yield (
                known if "." in name.rpartition("experts")[2][1:] or "experts" not in name else f"{known}.weight",
                array,
            )


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
