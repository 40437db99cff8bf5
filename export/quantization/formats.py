"""The table of formats' implementations, and the function that applies one of them to a graph file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
from onnx_ir.passes import common

from edgemix.errors import InputError
from edgemix.export.graphs.batch_invariant_attention import make_batch_invariant
from edgemix.export.graphs.rewrites import CONTRIB
from edgemix.export.graphs.weights import by_activation, head, linears
from edgemix.export.quantization.algorithms.hqq import hqq
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.quantization.graph.dynamic import quantize_dynamic, quantize_head
from edgemix.export.quantization.graph.embeddings import has_blocks, quantize_embeddings
from edgemix.export.quantization.graph.emission import BlockSums, Emitter, block_emitter, emit_blocks, nf4_emitter
from edgemix.export.quantization.graph.float16 import compute_in_float16, store_halves, store_in_float16
from edgemix.export.quantization.graph.key_value import quantize_cache
from edgemix.formats import FORMAT_SPECS
from edgemix.progress import NO_PROGRESS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from edgemix.export.graphs.weights import Linear
    from edgemix.export.quantization.algorithms.block_table import BlockTable
    from edgemix.export.quantization.algorithms.blocks import Blocks
    from edgemix.export.quantization.graph.key_value import Scales
    from edgemix.formats import Format, FormatSpec, Target
    from edgemix.progress import Progress

Algorithm = Literal["rtn", "hqq"]

_BLOCK = 32
_INT8 = block_emitter(partial(rtn, bits=8, block=_BLOCK, symmetric=True))

INT4_ALGORITHMS: Mapping[Algorithm, Callable[..., Blocks]] = {
    "rtn": partial(rtn, bits=4, symmetric=False),
    "hqq": partial(hqq, bits=4),
}
"""The algorithms of int4; each takes the size of blocks as `block`."""

EMITTERS: Mapping[Format, Emitter | None] = {
    "fp32": None,
    "fp16": None,
    "int8": _INT8,
    "int8-dynamic": None,
    "int4": block_emitter(partial(INT4_ALGORITHMS["rtn"], block=_BLOCK)),
    "nf4": nf4_emitter,
}
"""What replaces the linears between embedding and head; None where they stay in floating point or, for int8-dynamic,
are handled together."""


def quantize(
    source: Path,
    output: Path,
    format: Format,  # noqa: A002
    *,
    target: Target,
    algorithm: Algorithm = "rtn",
    group: int = _BLOCK,
    table: BlockTable | None = None,
    calibration: Sequence[Sequence[int]] | None = None,
    low_rank: Collection[str] = (),
    cache: Scales | None = None,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a float32 decoder graph in another weight format; equal sources give equal bytes.

    The names and axes of inputs and outputs stay. On `cuda`, every format but fp32 computes in float16, and the cache
    and the logits are float16. Quantized formats keep embedding and head in 8 bits (see `tables`, and `dynamic`).

    Args:
        source: The float32 graph, with its external data beside it.
        output: The graph to write; its external data goes beside it, as OUTPUT.data.
        format: A row of `EMITTERS`.
        target: The provider that will run the graph.
        algorithm: A row of `INT4_ALGORITHMS`; the other formats have no choice.
        group: Inputs that share a scale in int4.
        table: Blocks of the model's linears that were computed before.
        calibration: Windows of token ids; `int8-dynamic` needs some. With some, the head of int4 and int8 is
            an int8-dynamic product, too, unless the table has blocks for it: as fast for one token, faster for more.
        low_rank: Names of weights whose inputs are so few that rounding activations takes longer than it saves: stored
            in float16, they multiply in float32 (24 rows of 48 by 1,536: 37 microseconds; 8-bit blocks 244).
        cache: Keys and values are kept in 8 bits, with these scales.
        progress: Progress callback.

    Raises:
        InputError: `target` has no kernels for `format`, or it needs calibration text.
    """
    spec = FORMAT_SPECS[format]
    _check(spec, target, calibration)
    model = _load(source)
    graph = model.graph
    emit = block_emitter(partial(INT4_ALGORITHMS[algorithm], block=group)) if spec.mixed_bits else EMITTERS[format]
    if emit is not None:
        text = calibration if target == "cpu" else None
        _emit_blocks(model, source, emit, table=table, calibration=text, low_rank=low_rank, progress=progress)
    elif format == "int8-dynamic":
        last = head(graph)
        quantize_embeddings(graph, but=last.weight if last else None)
        quantize_dynamic(model, source.parent, calibration or (), outliers=_INT8, low_rank=low_rank, progress=progress)
    if spec.compute_dtype(target) == "float16":
        compute_in_float16(graph, model.opset_imports[""])
    elif not spec.floating_point:
        store_halves(graph, low_rank)
    elif not spec.reference:
        store_in_float16(graph)
    if cache is not None:
        quantize_cache(graph, cache)  # the operator reads one row of queries there as it does several
    elif target == "cpu":
        make_batch_invariant(graph)
    _save(model, output)


def _check(spec: FormatSpec, target: Target, calibration: Sequence[Sequence[int]] | None) -> None:
    """Raise InputError if a target has no kernels for the format, or its calibration text is missing."""
    if target not in spec.targets:
        raise InputError(
            f"format {spec.name} does not run on {target}: ONNX Runtime quantizes activations on CPUs only",
            remedy="Choose int8 (8-bit weights, float16 activations) for cuda, or the target cpu.",
        )
    if spec.calibration == "required" and not calibration:
        raise InputError(f"format {spec.name} observes activations and needs calibration text")


def _load(source: Path) -> ir.Model:
    """Load a graph with constants as initializers and without Identity: then a weight is found at its reader."""
    model = ir.load(source)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    return model


def _emit_blocks(
    model: ir.Model,
    source: Path,
    emit: Emitter,
    *,
    table: BlockTable | None,
    calibration: Sequence[Sequence[int]] | None,
    low_rank: Collection[str],
    progress: Progress,
) -> None:
    """Replace embeddings and linears by blocks; with calibration text, the head becomes an int8-dynamic product."""
    graph = model.graph
    if table is not None:
        emit = _prefer_table(table, emit, BlockSums(graph))
    last = head(graph)
    others = [linear for linear in linears(graph) if last is None or linear.node is not last.node]
    if last is None or not calibration or has_blocks(table, last.matrix()):
        quantize_embeddings(graph, table)
    else:
        quantize_embeddings(graph, table, but=last.weight)
        quantize_head(model, source.parent, calibration, progress=progress)
    for readers in by_activation(linear for linear in others if linear.weight.name not in low_rank):
        emit(graph, readers)


def _prefer_table(table: BlockTable, otherwise: Emitter, sums: BlockSums) -> Emitter:
    """Return an emitter that takes linears' blocks from the table if it has them."""

    def emit(graph: ir.Graph, readers: Sequence[Linear]) -> None:
        found = {linear: blocks for linear in readers if (blocks := table.find(linear.matrix())) is not None}
        if found:
            emit_blocks(graph, [*found], [*found.values()], sums)
        if others := [linear for linear in readers if linear not in found]:
            otherwise(graph, others)

    return emit


def _save(model: ir.Model, output: Path) -> None:
    """Write the graph without unused nodes and without the exporter's notes (source lines, paths)."""
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    for part in (model, model.graph):
        part.doc_string = None
        part.metadata_props.clear()
    model.opset_imports.setdefault(CONTRIB, 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Page-aligned, so that large weights can be mapped into memory and read in place.
    ir.save(model, output, external_data=f"{output.name}.data", alignment=4096)
