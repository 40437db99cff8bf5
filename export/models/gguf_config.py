"""Check a model against the metadata and the tensors of its GGUF file, and set what transformers does not read.

transformers reads a few keys of each architecture and gives the rest the values of its configuration classes. Here
every key of the model is set, known to change nothing, or refused by name; every tensor has its place in the model, and
every parameter of the model its tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import LlamaConfig

from edgemix.errors import InputError
from edgemix.export.models.gguf_header import DAMAGED, GgufHeader
from edgemix.export.models.gguf_rope import ROPE_TENSORS, rope_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

_FOLDER = "Give the model's Hugging Face folder."

_ARCHITECTURES = frozenset(
    (
        *("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma2", "gemma3", "phi3", "gpt2", "stablelm"),
        *("starcoder2", "falcon", "bloom", "nemotron"),
    )
)
"""Architectures whose models, read from a file, were compared with what the file was written from."""

_ATTRIBUTES = {
    "context_length": ("max_position_embeddings", "seq_length"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "attention.scale": ("attention_multiplier",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""Key of the metadata, without the architecture -> the configuration's name for it, the first that the class has."""

_NEUTRAL: dict[str, Callable[[Any, Any], bool]] = {
    "context_length": lambda _, config: config.model_type == "bloom",
    "attention.head_count_kv": lambda value, config: value == config.num_attention_heads,
    "feed_forward_length": lambda value, config: value == 4 * config.hidden_size,
    "attention.scale": lambda value, config: (
        value == 0 or math.isclose(value, _head_size(config) ** -0.5, rel_tol=1e-5)
    ),
    "attention.clamp_kqv": lambda value, _: value == 0,
    "attention.max_alibi_bias": lambda value, config: value == (8 if config.model_type == "bloom" else 0),
    "attention.causal": lambda value, _: value is True,
    "attn_logit_softcapping": lambda value, _: value == 0,
    "final_logit_softcapping": lambda value, _: value == 0,
    "logit_scale": lambda value, _: value in (0, 1),
    "residual_scale": lambda value, _: value in (0, 1),
    "embedding_scale": lambda value, _: value in (0, 1),
    "expert_count": lambda value, _: value == 0,
    "expert_used_count": lambda value, _: value == 0,
    "expert_weights_scale": lambda value, _: value in (0, 1),
    "expert_gating_func": lambda value, config: value in (0, 2 if config.model_type == "minimax_m2" else 1),
    "expert_weights_norm": lambda value, _: value is False,
    "pooling_type": lambda value, _: value == 0,
    "use_parallel_residual": lambda value, config: value is (config.model_type == "bloom"),
    "tensor_data_layout": lambda *_: True,
}
"""Key -> whether a value changes nothing in a model whose configuration has no name for it."""

_WINDOWED = frozenset({"phi3", "starcoder2", "gemma2", "gemma3_text", "gpt_oss"})
"""Model types whose attention follows `sliding_window`."""

_MISTRAL = frozenset({"model_type", "architectures", "sliding_window"})
"""What a mistral's configuration has of its own."""

_WIDE_QUERIES = {"gemma2": 46, "gemma3_text": 62}
"""Model type -> blocks of the model whose queries are scaled by its width over its heads, not by a head's width."""

_UNUSED_TENSORS = (".attn_rot_embd.",)
"""Parts of the names of tensors that old converters wrote and nobody reads."""


def check_sizes(header: GgufHeader) -> None:
    """Check the architecture and the counts of which a model is built, before one is.

    Raises:
        InputError: It is not known, or they do not fit the file's tensors, or differ by layer.
    """
    if header.architecture not in _ARCHITECTURES:
        raise InputError(
            f"{header.name}: models of the architecture {header.architecture!r:.60} cannot be read from GGUF files",
            f"{_FOLDER} Known are {', '.join(sorted(_ARCHITECTURES))}.",
        )
    for key, value in header.stated.items():
        if isinstance(value, np.ndarray | list):
            same = isinstance(value, np.ndarray) and value.size and (value == value[0]).all()
            what = "is a list of values" if same else "differs by layer"
            raise InputError(f"{header.name}: {header.architecture}.{key} {what}, which is not supported", _FOLDER)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{header.name}: {header.architecture}.{key} is {value}", DAMAGED)
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    stated = header.stated.get("block_count")
    if stated != len(blocks):
        raise InputError(
            f"{header.name}: block_count is {stated}, but its tensors are of {len(blocks)} blocks", DAMAGED
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{header.name}: the tensor token_embd.weight is missing", DAMAGED)
    rows, width = embedding.shape
    counts = {"embedding_length": width, "vocab_size": rows, "attention.head_count": width}
    for key, largest in counts.items():
        value = header.stated.get(key, largest)
        exact = key != "attention.head_count"
        if type(value) is not int or not 0 < value <= largest or (exact and value != largest):
            raise InputError(
                f"{header.name}: {header.architecture}.{key} is {value}, but token_embd.weight is {rows} x {width}",
                DAMAGED,
            )


def stated_config(config: Any, header: GgufHeader) -> Any:
    """Return the configuration that transformers read, set to what the metadata state.

    Raises:
        InputError: A key changes the model in a way that its class, or edgemix, does not know.
    """
    if config.model_type == "mistral":  # by its name; llama.cpp knows no such architecture
        config = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key not in _MISTRAL})
    _set_head_size(config, header)
    for key, value in header.stated.items():
        if key in ("attention.key_length", "attention.value_length", "attention.sliding_window") or "rope." in key:
            continue
        name = next((name for name in _ATTRIBUTES.get(key, ()) if hasattr(config, name)), None)
        if name is not None:
            setattr(config, name, _value(key, value))
        elif key not in _NEUTRAL or not _NEUTRAL[key](value, config):
            raise InputError(
                f"{header.name}: {header.architecture}.{key} is {value!r:.60}, which is not supported", _FOLDER
            )
    config.vocab_size = header.tensors["token_embd.weight"].shape[0]
    config.bos_token_id, config.eos_token_id = header.token_id("bos"), header.token_id("eos")
    config.pad_token_id = header.token_id("padding")
    config.tie_word_embeddings = "output.weight" not in header.tensors
    for name, tensor in {"attention_bias": "attn_output.bias", "mlp_bias": "ffn_down.bias"}.items():
        if hasattr(config, name):
            setattr(config, name, f"blk.0.{tensor}" in header.tensors)
    _set_window(config, header)
    rope_parameters(config, header)
    return config


def _value(key: str, value: Any) -> Any:
    if key.endswith("softcapping"):
        return value or None
    return value


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _set_head_size(config: Any, header: GgufHeader) -> None:
    usual = config.hidden_size // config.num_attention_heads
    size = header.stated.get("attention.key_length", usual)
    if header.stated.get("attention.value_length", size) != size:
        raise InputError(
            f"{header.name}: attention.value_length is not attention.key_length, which is not supported", _FOLDER
        )
    if _head_size(config) != size:
        config.head_dim = size
    blocks = _WIDE_QUERIES.get(config.model_type)
    if blocks is not None:
        config.query_pre_attn_scalar = usual if config.num_hidden_layers == blocks else size


def _set_window(config: Any, header: GgufHeader) -> None:
    window = header.stated.get("attention.sliding_window")
    if config.model_type in _WINDOWED:
        if window is not None or not config.model_type.startswith(("gemma", "gpt_oss")):
            config.sliding_window = window or None
    elif window and window < header.stated.get("context_length", 0):
        raise InputError(
            f"{header.name}: {header.architecture}.attention.sliding_window is {window}, which is not supported",
            _FOLDER,
        )


def check_tensors(model: PreTrainedModel, header: GgufHeader) -> None:
    """Check that the file's tensors are the model's parameters, one for one.

    Args:
        model: The model, which may be without its weights.
        header: The file's header.

    Raises:
        InputError: Names the first tensors that are missing, have another shape, or have no place in the model.
    """
    left = {name for name in header.tensors if not any(part in name for part in _UNUSED_TENSORS)} - ROPE_TENSORS
    missing, misshapen = [], []
    for parameter, names, shape in _expected(model, header):
        tensor = next((header.tensors[name] for name in names if name in left), None)
        if tensor is None:
            missing.append(names[0] if names else parameter)
        elif _essential(tensor.shape) != _essential(shape):
            misshapen.append(f"{tensor.name} is {list(tensor.shape)}, not {list(shape)}")
        left -= set(names)
    for what, found in (("missing: ", missing), ("", misshapen), ("not part of the model: ", sorted(left))):
        if found:
            listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            raise InputError(
                f"{header.name}: tensors do not fit the {model.config.model_type} model that its metadata state: "
                f"{what}{listed}",
                "The file is incomplete, or its architecture has parts that cannot be read from GGUF. " + _FOLDER,
            )


def _expected(model: PreTrainedModel, header: GgufHeader) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Yield each parameter's name, the names that its tensor may have in the file, and the tensor's shape."""
    import gguf

    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[header.architecture], model.config.num_hidden_layers)
    prefix = f"{model.base_model_prefix}."
    for parameter, value in model.named_parameters():
        parts = {parameter: tuple(value.shape)}
        if parameter.endswith("experts.gate_up_proj"):  # the experts' two matrices are one parameter
            experts, rows, columns = value.shape
            stem = parameter.removesuffix("gate_up_proj")
            parts = {f"{stem}{half}_proj": (experts, rows // 2, columns) for half in ("gate", "up")}
        for part, shape in parts.items():
            spellings = (names.get_name(name, (".weight", ".bias")) for name in (part, part.removeprefix(prefix)))
            known = next((name for name in spellings if name), None)
            yield part, () if known is None else (known, f"{known}.weight"), shape


def _essential(shape: tuple[int, ...]) -> list[int]:
    """Return a shape without what converters change: transposed axes, and axes of length 1."""
    return sorted(size for size in shape if size != 1)
