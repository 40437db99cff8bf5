"""Decoder graphs from mobius-onnx, ONNX Runtime's own model definitions."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from edgemix.errors import EdgemixError
from edgemix.export.models.architecture import context_length, norm_epsilon, sliding_windows
from edgemix.export.parity.limits import CHECKED_WINDOW
from edgemix.tasks import DEFAULT_TASK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def build(model: PreTrainedModel, *, fused: bool) -> ir.Model:
    """Build an fp32 decoder graph of `model`, which refers to the model's weights without a copy where possible.

    Args:
        model: A causal language model in fp32 on the CPU.
        fused: True for GroupQueryAttention over a shared cache, False for the standard Attention over a growing one.

    Raises:
        EdgemixError: mobius does not know the model's type, or its graph lacks weights or a sliding window.
    """
    import mobius
    from mobius._config_resolver import _config_from_hf, _default_task_for_model
    from mobius._registry import registry

    model_type = model.config.model_type
    if model_type not in registry:
        raise EdgemixError("it does not know this model type")
    if (task := _default_task_for_model(model_type)) != DEFAULT_TASK:
        raise EdgemixError(f"it builds this model type for another task, {task}")
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise EdgemixError("it builds chunked attention as full attention")

    module_class = registry.get(model_type)
    config = _config_from_hf(model.config, module_class=module_class)
    config = dataclasses.replace(config, dtype=ir.DataType.FLOAT)
    # mobius reads the epsilon from configuration keys that some model types do not have.
    if hasattr(config, "rms_norm_eps") and (epsilon := norm_epsilon(model)) is not None:
        config = dataclasses.replace(config, rms_norm_eps=epsilon)
    module = module_class(config)
    with _quiet():
        package = mobius.build_from_module(module, config, task, execution_provider="cpu" if fused else "default")
        weights = module.preprocess_weights(dict(model.state_dict()))
        package.apply_weights(weights, prefix_map=getattr(module, "weight_prefix_map", None))
    graph: ir.Model = package["model"]

    missing = [name for name, value in graph.graph.initializers.items() if value.const_value is None]
    if missing:
        raise EdgemixError(f"its graph has {len(missing)} weights that the model lacks, such as {missing[0]}")
    _check_rotation(graph.graph, model)
    windows = sliding_windows(model.config)
    if fused:
        _fit_attention(graph.graph, windows)
    elif any(window and window > CHECKED_WINDOW for window in windows):
        raise EdgemixError("its standard Attention may ignore sliding windows, and the model's are too long to check")
    # ONNX Runtime has kernels for all of these; a function body would only cost it time to load.
    graph.functions.clear()
    return graph


def _check_rotation(graph: ir.Graph, model: PreTrainedModel) -> None:
    """Compare the table of rotary angles with the model's over the whole context.

    The parity gate reads short texts, where a wrong scaling of long positions hardly shows.
    """
    frequencies = [module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")]
    tables = [value for name, value in graph.initializers.items() if name.endswith("rotary_emb.cos_cache")]
    if len(frequencies) != 1 or len(tables) != 1 or tables[0].shape[1] != len(frequencies[0]):
        return
    table = torch.from_numpy(tables[0].const_value.numpy())
    positions = torch.arange(min(len(table), context_length(model.config)))
    scaling = next(
        (module.attention_scaling for module in model.modules() if hasattr(module, "attention_scaling")), 1.0
    )
    expected = torch.outer(positions.float(), frequencies[0].float()).cos() * scaling
    # In fp32 an angle of 100,000 is exact to 1e-2.
    if (table[: len(positions)] - expected).abs().max() > 0.05:
        raise EdgemixError("its rotary embedding is not the model's at long positions")


def _fit_attention(graph: ir.Graph, windows: tuple[int | None, ...]) -> None:
    """Set each GroupQueryAttention's sliding window, which fusing drops with the mask, and remove an attribute that
    ONNX Runtime does not know: it reads from the table of angles how much of a head is rotated.

    Raises:
        EdgemixError: A layer is not fused, or has sizes that the operator cannot do.
    """
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if len(nodes) != len(windows):
        raise EdgemixError(f"GroupQueryAttention can take {len(nodes)} of {len(windows)} layers")
    for node, window in zip(nodes, windows, strict=True):
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", -1 if window is None else window)
        node.attributes.pop("rotary_embedding_dim", None)
        head_size = node.inputs[3].shape[3]
        rotated = 2 * node.inputs[7].shape[1] if len(node.inputs) > 7 and node.inputs[7] is not None else 0
        if head_size % 8 or rotated % 16:
            raise EdgemixError(
                f"GroupQueryAttention cannot do heads of size {head_size}"
                + (f" of which {rotated} are rotated" if rotated else "")
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence mobius' warnings about its own options; the parity gate checks the graph."""
    logger = logging.getLogger("mobius")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            yield
    finally:
        logger.setLevel(level)
