"""The one table of weight formats, and the function that applies a row of it to a graph file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
from onnx_ir.passes import common

from edgemix.errors import InputError
from edgemix.export.quantization.emission import CONTRIB, Emitter, block_emitter, dynamic_emitter, nf4_emitter
from edgemix.export.quantization.float16 import compute_in_float16, store_in_float16
from edgemix.export.quantization.hqq import hqq
from edgemix.export.quantization.rtn import rtn
from edgemix.export.quantization.tables import quantize_tables
from edgemix.export.quantization.weights import linears

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemix.formats import Format, Target

Algorithm = Literal["rtn", "hqq"]

_BLOCK = 32
_INT8 = block_emitter(partial(rtn, bits=8, block=_BLOCK, symmetric=True))

INT4_ALGORITHMS: Mapping[Algorithm, Emitter] = {
    "rtn": block_emitter(partial(rtn, bits=4, block=_BLOCK, symmetric=False)),
    "hqq": block_emitter(partial(hqq, bits=4, block=_BLOCK)),
}
"""How int4 finds its blocks."""

FORMATS: Mapping[Format, Emitter | None] = {
    "fp32": None,
    "fp16": None,
    "int8": _INT8,
    "int8-dynamic": dynamic_emitter(outliers=_INT8),
    "int4": INT4_ALGORITHMS["rtn"],
    "nf4": nf4_emitter,
}
"""What takes the place of the linears between embedding and head; None leaves them in floating point."""


def quantize(
    source: Path,
    output: Path,
    format: Format,  # noqa: A002
    *,
    target: Target,
    algorithm: Algorithm = "rtn",
) -> None:
    """Write a float32 decoder graph in another weight format; equal sources give equal bytes.

    The names and axes of inputs and outputs stay. On `cuda`, every format but fp32 computes in float16, and the cache
    and the logits are float16. Quantised formats keep embedding and head in 8 bits (see `tables`).

    Args:
        source: The float32 graph, with its external data beside it.
        output: The graph to write; its external data goes beside it, as OUTPUT.data.
        format: A row of `FORMATS`.
        target: The provider that will run the graph.
        algorithm: A row of `INT4_ALGORITHMS`; the other formats have no choice.

    Raises:
        InputError: `target` has no kernels for `format`.
    """
    if format == "int8-dynamic" and target == "cuda":
        raise InputError(
            "format int8-dynamic does not run on cuda: ONNX Runtime quantises activations on CPUs only",
            remedy="Choose int8 (8-bit weights, float16 activations) for cuda, or the target cpu.",
        )
    model = ir.load(source)
    graph = model.graph
    # Constants as initializers and no Identity: then a weight is found at its reader.
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    emit = INT4_ALGORITHMS[algorithm] if format == "int4" else FORMATS[format]
    if emit is not None:
        quantize_tables(graph)
        for linear in list(linears(graph)):
            emit(graph, linear)
    if target == "cuda" and format != "fp32":
        compute_in_float16(graph, model.opset_imports[""])
    elif format == "fp16":
        store_in_float16(graph)
    _save(model, output)


def _save(model: ir.Model, output: Path) -> None:
    """Write the graph without what nothing reads, and without the exporter's notes (source lines, paths)."""
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    for part in (model, model.graph):
        part.doc_string = None
        part.metadata_props.clear()
    model.opset_imports.setdefault(CONTRIB, 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Page-aligned, so that large weights can be mapped into memory and read in place.
    ir.save(model, output, external_data=f"{output.name}.data", alignment=4096)
