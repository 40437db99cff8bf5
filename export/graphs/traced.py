"""Decoder graphs traced from the torch model by transformers' own exporters: slow, but for every architecture."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from edgemix.bundle import graph_io
from edgemix.errors import EdgemixError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    from transformers import PreTrainedModel

# The tracer takes equal sizes for the same axis, and ones for constants.
_BATCH, _PAST, _SEQUENCE = 2, 5, 3
OPSET = 21
"""The first opset whose QuantizeLinear takes blocks, which int8-dynamic rounds activations with."""


def build(model: PreTrainedModel) -> ir.Model:
    """Trace an fp32 decoder graph of `model` with a growing cache, for any batch, past and sequence.

    Raises:
        EdgemixError: The model's state is not a plain key-value cache. The tracer raises other errors.
    """
    # Takes a second to import, and few models need it.
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with quiet_tracer():
        sample = _sample(model)
        axes = _dynamic_axes(len(sample["past_key_values"].layers))
        exported = OnnxExporter().export(model, sample, OnnxConfig(dynamic_shapes=axes, opset_version=OPSET))
    graph: ir.Model = exported.program
    _rename(graph.graph)
    return graph


def _sample(model: PreTrainedModel) -> dict[str, Any]:
    """Return inputs to trace with: a few tokens after a past."""
    past = torch.ones(_BATCH, _PAST, dtype=torch.long)
    with torch.no_grad():
        # A plain growing cache for sliding layers too: the mask applies their window.
        output = model(input_ids=past, past_key_values=DynamicCache(), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise EdgemixError("its state is not a cache of keys and values")
    positions = torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, _SEQUENCE).contiguous()
    return {
        graph_io.INPUT_IDS: torch.ones(_BATCH, _SEQUENCE, dtype=torch.long),
        graph_io.ATTENTION_MASK: torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long),
        graph_io.POSITION_IDS: positions,
        "past_key_values": cache,
        "use_cache": True,
    }


def _dynamic_axes(layers: int) -> dict[str, Any]:
    """Return the dynamic axes of `_sample`; naming only these spares the tracer most of its work."""
    tokens = {0: Dim.AUTO, 1: Dim.AUTO}
    return {
        graph_io.INPUT_IDS: tokens,
        graph_io.ATTENTION_MASK: tokens,
        graph_io.POSITION_IDS: tokens,
        "past_key_values": [{0: Dim.AUTO, 2: Dim.AUTO}] * (2 * layers),
    }


def _rename(graph: ir.Graph) -> None:
    """Rename transformers' tensors to the names of `graph_io`."""
    for prefix, values in ((graph_io.PAST_PREFIX, graph.inputs), (graph_io.PRESENT_PREFIX, graph.outputs)):
        for value in values:
            _, found, rest = (value.name or "").partition("past_key_values.layers.")
            if found:
                layer, _, part = rest.partition(".")
                value.name = f"{prefix}{layer}.{part.removesuffix('s')}"


@contextmanager
def quiet_tracer() -> Iterator[None]:
    """Silence the tracer's output; the parity gate checks the graph."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
