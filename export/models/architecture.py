"""Properties of a torch model beyond its weights: context length, sliding windows, the epsilon of its norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DynamicCache

from edgemix.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
_CONTEXT_WITHOUT_LIMIT = 2048
"""Context of models without position tables (ALiBi) whose configuration has no length: a usual training length."""
_MOST_POSITIONS = 1 << 24
_TABLE_SHARE, _LEAST_CONTEXT = 1 / 32, 8192


def context_length(config: Any) -> int:
    """Return the longest sequence, in tokens, that a graph of the model may be used for.

    Rotary embeddings that change with the sequence's length (`dynamic`, `longrope`) cannot be cached exactly, so there
    it is the original length, up to which they do not change.
    """
    config = config.get_text_config()
    lengths = [value for key in _CONTEXT_KEYS if isinstance(value := getattr(config, key, None), int) and value > 0]
    context = lengths[0] if lengths else _CONTEXT_WITHOUT_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        context = min(context, original or context)
    return context


def graph_context(model: PreTrainedModel, most: int | None = None) -> int:
    """Return the longest sequence, in tokens, that a graph of a model is made for.

    Rotary tables have a row for every position: without `most`, there are so many that they take no more than
    `_TABLE_SHARE` of the model's fp32 weights, but at least `_LEAST_CONTEXT`.

    Args:
        model: The model.
        most: A limit that the user gives.

    Raises:
        InputError: The model states more positions than any model has.
    """
    longest = context_length(model.config)
    if longest > _MOST_POSITIONS:
        raise InputError(
            f"the model's configuration states {longest:,} positions; edgemix makes graphs for at most "
            f"{_MOST_POSITIONS:,}",
            "Correct max_position_embeddings in its config.json.",
        )
    if most is not None:
        return min(longest, most)
    row = sum(8 * len(module.inv_freq) for module in model.modules() if hasattr(module, "inv_freq"))  # cosine and sine
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return min(longest, max(_LEAST_CONTEXT, int(_TABLE_SHARE * weights) // row)) if row else longest


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Return each layer's sliding window in tokens, the token itself included, or None for full attention."""
    if hasattr(config, "attention_layers"):  # GPT-Neo
        return tuple(config.window_size if kind == "local" else None for kind in config.attention_layers)
    return tuple(layer.sliding_window if layer.is_sliding else None for layer in DynamicCache(config=config).layers)


def norm_epsilon(model: PreTrainedModel) -> float | None:
    """Return the epsilon of the model's normalization layers, or None if they differ."""
    epsilons = {
        value
        for module in model.modules()
        for name in ("eps", "variance_epsilon")
        if isinstance(value := getattr(module, name, None), float)
    }
    return epsilons.pop() if len(epsilons) == 1 else None
