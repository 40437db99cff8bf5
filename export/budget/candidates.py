"""Graphs that are made by plain rounding to be measured: as large and as fast as those whose weights take minutes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

from edgemix.bundle.graph_io import GraphConfig
from edgemix.bundle.stages import stage_key
from edgemix.errors import storage_errors
from edgemix.export.graphs.decoder import MODEL_FILE
from edgemix.export.models.layout import layout
from edgemix.export.models.loading import versions
from edgemix.export.pruning.packing import pack_weights
from edgemix.export.quantization import quantize
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.formats import FORMAT_SPECS, MIXED_BITS, Format, candidate_formats

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemix.export.context import ExportContext
    from edgemix.export.stages.blocks import MemberBlocks
    from edgemix.export.stages.graphs import MemberGraphs
    from edgemix.export.stages.models import MemberModels
    from edgemix.recipe.schema import MemberRecipe


class MeasuredMember(msgspec.Struct, frozen=True):
    """The measurements of a member before formats are chosen.

    Attributes:
        config: Configuration of its quantized graphs.
        bytes: Size of its graph on disk, by format.
        groups: Names of the linears that must have the same bits.
        shapes: [out, in] of each linear.
        losses: Loss of each linear by bits; see `sensitivity.quantization_costs`. A GGUF file's own 4 bits lose
            nothing.
        sparse: Whether graphs are stored without their zeros.
    """

    config: GraphConfig
    bytes: dict[Format, int]
    groups: tuple[tuple[str, ...], ...]
    shapes: dict[str, tuple[int, int]]
    losses: dict[str, dict[int, float]]
    sparse: bool


class CandidateGraphs:
    """Candidate graphs, made on demand in the writer's scratch folder and kept until `remove`.

    Args:
        context: The export; the members to choose for have the format int4.
        models: The members' models.
        graphs: The members' fp32 graphs.
        blocks: The members' quantized blocks.
    """

    def __init__(
        self, context: ExportContext, *, models: MemberModels, graphs: MemberGraphs, blocks: MemberBlocks
    ) -> None:
        self._context, self._recipe, self._folder = context, context.recipe, context.writer.scratch / "candidates"
        self._models, self._graphs, self._blocks = models, graphs, blocks

    def measure(self, spec: MemberRecipe) -> MeasuredMember:
        """Make a member's graph in every format, and estimate what it loses.

        Raises:
            InputError: The member cannot be read, or its structure is not known.
        """
        key = stage_key(
            graph=self._graphs.key(spec),
            group=self._models.quantization(spec).group,
            text=self._models.data_digest(),
            versions=versions(),
            seed=self._recipe.seed,
        )

        def make() -> MeasuredMember:
            record, member = self._graphs.make(spec), self._models.load(spec)
            parts = layout(member.model)
            linears, kept = parts.linears(), self._blocks.repacked(spec, 4)
            losses = {name: {4: 0.0, 8: 0.0} for name in linears} if kept else self._blocks.costs(spec, member)
            return MeasuredMember(
                config=msgspec.structs.replace(
                    record.config, dtype=FORMAT_SPECS[MIXED_BITS].compute_dtype(self._recipe.target)
                ),
                bytes={
                    each: self._make(spec, each, each, table=kept if each == MIXED_BITS else None, sparse=record.sparse)
                    for each in candidate_formats(self._recipe.target)
                },
                groups=tuple(group for layer in parts.layers for group in layer.groups()),
                shapes={name: tuple(part.weight.shape) for name, part in linears.items()},
                losses=losses,
                sparse=record.sparse,
            )

        files = [self._folder / spec.name]
        return self._context.stage(f"candidates/{spec.name}", key, make, MeasuredMember, files=files)

    def path(self, spec: MemberRecipe, name: str) -> Path:
        """Return the path of a member's graph in a format, or `mixed`."""
        return self._folder / spec.name / name / MODEL_FILE

    def mix(self, spec: MemberRecipe, eight_bits: Sequence[str]) -> Path:
        """Make an int4 graph with some linears at 8 bits."""
        table, linears = BlockTable(), layout(self._models.load(spec).model).linears()
        block = self._models.quantization(spec).group
        for name in eight_bits:
            weight = linears[name].weight.contiguous().numpy()
            table.add(weight, rtn(weight, bits=8, block=block, symmetric=False))
        self._make(spec, MIXED_BITS, "mixed", table=table)
        return self.path(spec, "mixed")

    def remove(self) -> None:
        """Remove all graphs."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make(
        self,
        spec: MemberRecipe,
        weight_format: Format,
        name: str,
        *,
        table: BlockTable | None = None,
        sparse: bool = False,
    ) -> int:
        """Write a graph, and return its size on disk in bytes."""
        output, progress = self.path(spec, name), self._context.member_progress(spec)
        source, group = self._graphs.path(spec), self._models.quantization(spec).group
        with progress.stage(f"candidate {name}"), storage_errors(f"writing {output}"):
            text = self._graphs.calibration(spec, weight_format)
            quantize(
                source,
                output,
                weight_format,
                target=self._recipe.target,
                group=group,
                table=table,
                calibration=text,
            )
            if sparse:
                pack_weights(output)
            return sum(path.stat().st_size for path in output.parent.iterdir())
