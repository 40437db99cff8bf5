"""Keys and values in 8 bits: a quarter of the memory that a text takes, in graphs with GroupQueryAttention.

ONNX Runtime's operator rounds what it appends to the cache and reads it back as codes times scales. A scale belongs to
one channel of one head, symmetric around zero, and is set by the largest number that the float32 graph puts there on
calibration text; larger numbers are clipped later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemix.bundle.graph_io import present_of
from edgemix.errors import InputError
from edgemix.export.graphs.rewrites import add_initializer
from edgemix.progress import NO_PROGRESS
from edgemix.runtime.graphs.decoder import DecoderGraph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.graph_io import GraphConfig
    from edgemix.progress import Progress

    Scales = Mapping[str, NDArray[np.float32]]
    """Name of a past input -> the scales [1, heads, 1, head_size] of what it holds."""

_LARGEST = 127
_PAST, _SCALES = slice(3, 5), slice(12, 14)
"""Indices of GroupQueryAttention's inputs: keys, then values."""


def cache_scales(
    graph: Path, config: GraphConfig, windows: Sequence[Sequence[int]], *, progress: Progress = NO_PROGRESS
) -> Scales:
    """Find the scales of a graph's keys and values.

    Args:
        graph: The float32 graph.
        config: The graph's config.
        windows: Token ids of calibration text, cut to the context.
        progress: Progress callback.

    Raises:
        InputError: The graph's cache is a growing one.
        EdgemixError: ONNX Runtime is too old.
    """
    if config.cache != "shared":
        raise InputError(
            f"the cache of this model's graph ({config.exporter}) cannot be int8: only GroupQueryAttention has one",
            "Leave cache: int8 out of the recipe.",
        )
    member = DecoderGraph.load(graph, config)
    largest = [np.zeros((slot.heads, slot.head_size), np.float32) for slot in member.layout.slots]
    with progress.stage("key-value scales", len(windows)) as task:
        for window in windows:
            cache = member.new_cache()
            member.extend(cache, [window[: member.context]])
            for found, state in zip(largest, cache.state(int(cache.lengths[0])), strict=True):
                np.maximum(found, np.abs(state).max(axis=1), out=found)
            cache.free()
            task.advance()
    named = zip(member.layout.slots, largest, strict=True)
    # A channel that is always zero may have any scale.
    return {slot.past: np.where(found > 0, found / _LARGEST, 1)[None, :, None, :] for slot, found in named}


def quantize_cache(graph: ir.Graph, scales: Scales) -> None:
    """Let a graph store its keys and values in 8 bits; its past inputs and present outputs become int8.

    Args:
        graph: Changed in place.
        scales: From `cache_scales`.
    """
    outputs = {value.name: value for value in graph.outputs}
    for node in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        node.resize_inputs(_SCALES.stop)
        for index, (past, kind) in enumerate(zip(node.inputs[_PAST], ("k", "v"), strict=True)):
            for value in (past, outputs[present_of(past.name)]):
                value.dtype = ir.DataType.INT8
            node.replace_input_with(
                _SCALES.start + index, add_initializer(graph, f"{past.name}.scale", scales[past.name])
            )
            node.attributes[f"{kind}_quant_type"] = ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
