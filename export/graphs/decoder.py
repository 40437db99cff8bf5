"""Export a torch model as an ONNX decoder graph with a key-value cache, by the first of three paths within limits.

1. `mobius`: ONNX Runtime's own model definitions, GroupQueryAttention over a shared cache. The fast one.
2. `mobius-unfused`: the same definitions with the standard Attention over a growing cache, for head sizes and masks
   that GroupQueryAttention cannot do.
3. `transformers`: traced from the torch model itself, a growing cache. Knows every architecture, takes minutes.

Every path yields an fp32 graph with the tensors of `edgemix.bundle.graph_io`; for the target `cuda` too: the
quantization stage turns the whole graph, cache and logits included, to fp16 there. The files depend on the model alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgemix.bundle import graph_io
from edgemix.bundle.graph_io import CacheKind, GraphConfig
from edgemix.errors import EdgemixError, ParityError
from edgemix.export.graphs import mobius, traced
from edgemix.export.graphs.rewrites import add_initializer, cut_rotary_tables
from edgemix.export.graphs.weights import head
from edgemix.export.models.architecture import context_length, graph_context
from edgemix.export.models.verification import check_finite
from edgemix.export.parity.against_torch import check_graph
from edgemix.export.parity.limits import enforce
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgemix.bundle.manifest import GraphParity
    from edgemix.formats import Target

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

_CUDA_OPSET = 23
"""ONNX Runtime's CUDA provider lacks kernels for what opset 24 revised, such as Cast, Reshape and Shape (its issue
27729): those nodes would run on the CPU, with copies around each."""

_ALL = 2**40
"""Default of logits to keep: more than any sequence has, and no overflow where several members multiply it."""
_LAST = (("end", 2**63 - 1), ("axis", 1), ("zero", 0))

Gate = Callable[[Path, GraphConfig], "GraphParity"]


@dataclass(frozen=True)
class ExportedGraph:
    """A graph that passed the gate: its file, its config, the paths that were refused before it, its figures."""

    path: Path
    config: GraphConfig
    fallbacks: tuple[str, ...]
    parity: GraphParity


@dataclass(frozen=True)
class ExportPath:
    """One way to make a graph."""

    exporter: Literal["mobius", "mobius-unfused", "transformers"]
    cache: CacheKind
    build: Callable[[PreTrainedModel], ir.Model]


PATHS = (
    ExportPath("mobius", "shared", lambda model: mobius.build(model, fused=True)),
    ExportPath("mobius-unfused", "growing", lambda model: mobius.build(model, fused=False)),
    ExportPath("transformers", "growing", traced.build),
)


def export_graph(
    model: PreTrainedModel,
    folder: Path,
    *,
    target: Target,
    context: int | None = None,
    gate: Gate | None = None,
    force: bool = False,
    paths: Sequence[ExportPath] | None = None,
    progress: Progress = NO_PROGRESS,
) -> ExportedGraph:
    """Write `folder`/model.onnx and its external data for `model`.

    Args:
        model: A causal language model, fp32, on the CPU, in evaluation mode.
        folder: Where to; created if it is not there.
        target: The provider that the graph will run on. It decides the opset only.
        context: Most tokens of a sequence; see `graph_context`.
        gate: Measures a graph against its source; by default `check_graph` against `model`.
        force: If no path passes the gate, take the first whose graph runs.
        paths: The ways to make the graph, in order; `PATHS` by default.
        progress: Progress callback; logs every path that is refused, and why.

    Raises:
        InputError: Weights of the model are NaN or infinite, or it states too many positions.
        ParityError: Graphs run, but none of them is the model.
        EdgemixError: No graph runs; the message names the model type and each path's reason.
    """
    check_finite(model.config.model_type, model)
    length = graph_context(model, context)
    if context is None and length < (longest := context_length(model.config)):
        progress.log(
            f"{model.config.model_type}: made for {length:,} of {longest:,} tokens, as rotary tables for all would be "
            "large beside the weights; context: in the recipe asks for more"
        )
    measure = gate or (lambda path, config: check_graph(model, path, config))
    folder.mkdir(parents=True, exist_ok=True)
    model_type = model.config.model_type
    refused: dict[str, str] = {}
    kind: type[EdgemixError] = EdgemixError
    for forced in (False, True) if force else (False,):
        for path in paths or PATHS:
            try:
                config, parity = _attempt(path, model, folder, target, measure, context=length, forced=forced)
            except OSError:
                raise  # a failing disk says nothing about the path
            except Exception as error:  # noqa: BLE001 - exporters raise anything; the reason is logged and recorded
                reason = _one_line(error).replace(f"{folder}{os.sep}", "")
                if path.exporter not in refused:
                    progress.log(f"{model_type}: the path {path.exporter} is refused: {reason}")
                refused[path.exporter] = reason
                kind = ParityError if isinstance(error, ParityError) else kind
            else:
                return ExportedGraph(folder / MODEL_FILE, config, _as_lines(refused), parity)
    raise kind(
        f"no exporter can make a graph of the model type {model_type!r}:\n  " + "\n  ".join(_as_lines(refused)),
        "Use --force to take the first graph that runs." if kind is ParityError else "",
    )


def _attempt(
    path: ExportPath,
    model: PreTrainedModel,
    folder: Path,
    target: Target,
    measure: Gate,
    *,
    context: int,
    forced: bool,
) -> tuple[GraphConfig, GraphParity]:
    """Build, write, load and measure one path's graph; it reaches `folder` only if it passes."""
    graph = path.build(model)
    config = _finish(graph, model, path, target, context)
    scratch = folder / f".{path.exporter}"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed export
    scratch.mkdir()
    try:
        ir.save(graph, scratch / MODEL_FILE, external_data=DATA_FILE)
        parity = measure(scratch / MODEL_FILE, config)
        enforce(parity, forced=forced)
        for name in (MODEL_FILE, DATA_FILE):
            (scratch / name).replace(folder / name)
    finally:
        shutil.rmtree(scratch)
    return config, parity


def _finish(graph: ir.Model, model: PreTrainedModel, path: ExportPath, target: Target, context: int) -> GraphConfig:
    """Name the graph's axes, strip what depends on the machine, and return its config."""
    for value in [value for value in graph.graph.inputs if value.name == graph_io.POSITION_IDS and not value.uses()]:
        graph.graph.inputs.remove(value)
    cut_rotary_tables(graph.graph, context)
    vocabulary = _name_axes(graph.graph)
    _share_tied_head(graph.graph)
    _keep_some_logits(graph.graph)
    graph.graph.name = model.config.model_type
    graph.producer_name, graph.producer_version = "edgemix", None
    common.ClearMetadataAndDocStringPass()(graph)
    if target == "cuda":
        graph.graph.opset_imports[""] = min(graph.graph.opset_imports[""], _CUDA_OPSET)
    return GraphConfig(
        exporter=path.exporter,
        cache=path.cache,
        layers=sum(value.name.endswith(".key") for value in graph.graph.inputs),
        vocabulary=vocabulary,
        context=context,
    )


def _name_axes(graph: ir.Graph) -> int:
    """Name the dynamic axes of every input and output as `graph_io` does, and return the logits' width."""
    kind = graph_io.GRAPH_TENSORS["decoder"]
    for value in graph.inputs:
        if value.name in kind.inputs | kind.optional_inputs:
            value.shape = ir.Shape(["batch", "total" if value.name == graph_io.ATTENTION_MASK else "sequence"])
        elif value.name.startswith(graph_io.PAST_PREFIX):
            value.shape = ir.Shape(["batch", value.shape[1], "past", value.shape[3]])
        else:
            raise EdgemixError(f"its graph has an unknown input, {value.name}")
    pasts = {value.name: value for value in graph.inputs if value.name.startswith(graph_io.PAST_PREFIX)}
    presents = {graph_io.present_of(name): value for name, value in pasts.items()}
    vocabulary = 0
    for value in graph.outputs:
        if value.name == graph_io.LOGITS:
            vocabulary = value.shape[2]
            value.shape = ir.Shape(["batch", "kept", vocabulary])
        elif value.name in presents:
            past = presents.pop(value.name)
            value.shape = ir.Shape(["batch", past.shape[1], "total", past.shape[3]])
        else:
            raise EdgemixError(f"its graph has an unknown output, {value.name}")
    if presents or not isinstance(vocabulary, int) or not vocabulary:
        raise EdgemixError("its graph has no logits or does not give back its whole cache")
    return vocabulary


def _share_tied_head(graph: ir.Graph) -> None:
    """Let a tied head read the embedding through a Transpose instead of a transposed copy."""
    tables = [
        node.inputs[0] for node in graph if node.op_type == "Gather" and node.inputs[1].name == graph_io.INPUT_IDS
    ]
    for table in tables:
        for copy in [value for value in graph.initializers.values() if _is_transpose(value, table)]:
            transpose = ir.node("Transpose", [table], {"perm": [1, 0]})
            graph.insert_before(copy.uses()[0].node, transpose)
            copy.replace_all_uses_with(transpose.outputs[0])
            del graph.initializers[copy.name]


def _keep_some_logits(graph: ir.Graph) -> None:
    """Add an input for the number of last tokens that get logits: a prompt then skips most of the head's work.

    The input has a default, all tokens. Without a known head, the graph stays as it is.
    """
    linear = head(graph)
    hidden = None if linear is None else linear.node.inputs[0]
    if linear is None or hidden is None or hidden.shape is None or hidden.shape.rank() != 3:
        return
    keep = add_initializer(graph, graph_io.LOGITS_TO_KEEP, np.array([_ALL], np.int64))
    graph.inputs.append(keep)
    end, axis, zero = (add_initializer(graph, f"logits.{name}", np.array([each], np.int64)) for name, each in _LAST)
    # What begins with a shape stays on the host, on a GPU, too; CUDA graphs allow no copies between the two.
    ids = next(value for value in graph.inputs if value.name == graph_io.INPUT_IDS)
    count = ir.node("Shape", [ids], {"start": 1, "end": 2})
    rest = ir.node("Sub", [count.outputs[0], keep])
    start = ir.node("Max", [rest.outputs[0], zero])
    last = ir.node("Slice", [hidden, start.outputs[0], end, axis])
    last.outputs[0].dtype = hidden.dtype
    graph.insert_before(linear.node, [count, rest, start, last])
    linear.node.replace_input_with(0, last.outputs[0])


def _is_transpose(value: ir.Value, table: ir.Value) -> bool:
    if value.const_value is None or table.const_value is None or not value.uses():
        return False
    if tuple(value.const_value.shape) != tuple(reversed(table.const_value.shape)) or len(table.const_value.shape) != 2:
        return False
    return np.array_equal(value.const_value.numpy(), table.const_value.numpy().T)


def _as_lines(refused: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{exporter}: {reason}" for exporter, reason in refused.items())


def _one_line(error: Exception) -> str:
    """Return an error's message on one line, with its type unless it is edgemix's own."""
    message = error.message if isinstance(error, EdgemixError) else str(error)
    line = message.rpartition("Status Message: ")[2].strip().partition("\n")[0][:300]
    return line if isinstance(error, EdgemixError) else f"{type(error).__name__}: {line}"
