"""Graphs that members of one base share: the base's weights are stored and read once for all of them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec
import onnx_ir as ir

from edgemix.bundle.graph_io import GraphConfig
from edgemix.bundle.manifest import QuantizationParity
from edgemix.bundle.stages import stage_key
from edgemix.errors import InputError, storage_errors
from edgemix.export.graphs.decoder import MODEL_FILE
from edgemix.export.graphs.deltas import find_deltas
from edgemix.export.graphs.shared_base import add_members, addition, addition_matrices
from edgemix.export.parity.against_fp32 import check_quantized
from edgemix.export.parity.limits import within
from edgemix.export.quantization import quantize
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.stages.graphs import CALIBRATION_WINDOWS
from edgemix.formats import FORMAT_SPECS
from edgemix.recipe.schema import MemberRecipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.export.context import ExportContext
    from edgemix.export.graphs.deltas import Delta
    from edgemix.export.stages.blocks import MemberBlocks
    from edgemix.export.stages.graphs import MemberGraphs
    from edgemix.export.stages.models import MemberModels
    from edgemix.formats import Format
    from edgemix.recipe.schema import Recipe

RANKS = (64, 192)
"""Largest ranks of a member's additions to the base's linears, tried in this order until every member is within its
limits. The first is above the usual ranks of LoRA; a full fine-tune may need more. Three times that for a linear that
the exporter joined of three.
"""

_ADDITION_BITS, _ADDITION_BLOCK = 8, 16
"""Bits and block of the additions' first factors in int8 and int4; their second factors stay in floating point."""
_SHARED_FORMATS = tuple(name for name, row in FORMAT_SPECS.items() if row.shared_base)


class SharedBaseGraph(msgspec.Struct, frozen=True):
    """A graph that computes several members.

    Attributes:
        config: The graph's.
        parity: Member name -> how far its part of the graph's logits is from its own fp32 graph.
    """

    config: GraphConfig
    parity: dict[str, QuantizationParity]

    def failing(self) -> list[str]:
        """Return the names of the members that are over their format's limits."""
        return [name for name, figures in self.parity.items() if not within(figures)]


def groups(recipe: Recipe, models: MemberModels) -> list[tuple[MemberRecipe, ...]]:
    """Group the recipe's members by the graph that they may share, in the order of each group's first member."""
    found: dict[object, list[MemberRecipe]] = {}
    for spec in recipe.members:
        shares = recipe.stack and spec.prune is None and models.format(spec) in _SHARED_FORMATS
        base = recipe.stack if isinstance(recipe.stack, str) else spec.model
        key = (base, models.format(spec), models.quantization(spec)) if shares else spec.name
        found.setdefault(key, []).append(spec)
    return [tuple(group) for group in found.values()]


class SharedBaseGraphs:
    """Make graphs that compute several members.

    Args:
        context: The export.
        models: The members' models.
        graphs: The members' fp32 graphs.
        blocks: The members' quantized blocks.
    """

    def __init__(
        self, context: ExportContext, *, models: MemberModels, graphs: MemberGraphs, blocks: MemberBlocks
    ) -> None:
        self._context, self._recipe, self._progress = context, context.recipe, context.progress
        self._models, self._graphs, self._blocks = models, graphs, blocks

    def base(self, group: Sequence[MemberRecipe]) -> MemberRecipe:
        """Return the base model of a group, as a member."""
        first, named = group[0], self._recipe.stack
        model = named if isinstance(named, str) else first.model
        return MemberRecipe(f"{first.name}@base", model, format=first.format, quantization=first.quantization)

    def folder(self, group: Sequence[MemberRecipe]) -> str:
        """Return the folder in the bundle of a group's graph."""
        return f"stacks/{group[0].name}"

    def make(self, group: Sequence[MemberRecipe], output: Path, text: list[list[int]] | None) -> SharedBaseGraph | None:
        """Write a group's graph, or return None if one graph cannot compute them. The members' fp32 graphs stay.

        Args:
            group: At least two members.
            output: The file of the graph.
            text: Token ids that parity is measured on.

        Raises:
            As `MemberGraphs.make`.
        """
        base = self.base(group)
        for spec in (*group, base):
            self._graphs.make(spec)
        made = None
        for rank in RANKS:
            try:
                with self._progress.stage(f"shared graph, rank {rank} at most"):
                    exact, deltas = self._write(base, group, rank)
            except InputError as error:
                names = ", ".join(spec.name for spec in group)
                self._progress.log(f"{names}: one graph for each, as they cannot share one: {error}")
                break
            made = self._quantize(base, group, deltas, output, text)
            if exact or not made.failing():
                break
        shutil.rmtree(self._master(base).parent, ignore_errors=True)
        self._graphs.discard(base)
        return made

    def key(self, group: Sequence[MemberRecipe]) -> str:
        """Return the cache key of a group's graph, without the text that its parity is measured on."""
        first = group[0]
        return stage_key(
            graphs=[self._graphs.key(spec) for spec in (*group, self.base(group))],
            names=[spec.name for spec in group],
            format=self._models.format(first),
            quantization=self._models.quantization(first),
            data=self._models.data_digest(),
            seed=self._recipe.seed,
        )

    def _master(self, base: MemberRecipe) -> Path:
        """Return the file of the fp32 graph of several members."""
        return self._context.writer.scratch / f"{base.name}.stack" / MODEL_FILE

    def _write(
        self, base: MemberRecipe, group: Sequence[MemberRecipe], rank: int
    ) -> tuple[bool, dict[str, list[Delta]]]:
        """Write the fp32 graph of several members.

        Returns:
            Whether no rank was cut off, and the members' low-rank additions by the name of the base's weight.
        """
        model, master = ir.load(self._graphs.path(base)), self._master(base)
        members = [ir.load(self._graphs.path(spec)).graph for spec in group]
        most = rank * _joined(model.graph)
        deltas = find_deltas(model.graph, members, most)
        add_members(model.graph, deltas, len(group))
        with storage_errors(f"writing {master}"):
            shutil.rmtree(master.parent, ignore_errors=True)
            master.parent.mkdir(parents=True)
            ir.save(model, master, external_data=f"{MODEL_FILE}.data")
        return all(delta.rank < most for each in deltas.values() for delta in each), deltas

    def _quantize(
        self,
        base: MemberRecipe,
        group: Sequence[MemberRecipe],
        deltas: Mapping[str, Sequence[Delta]],
        output: Path,
        text: list[list[int]] | None,
    ) -> SharedBaseGraph:
        """Write the graph in its format, and compare each of its members with that member's fp32 graph."""
        weight_format, target, progress = self._models.format(group[0]), self._recipe.target, self._progress
        table = _table(self._blocks.find(base), deltas) if FORMAT_SPECS[weight_format].block_bits else None
        block = self._models.quantization(group[0]).group
        with progress.stage(weight_format), storage_errors(f"writing {output}"):
            shutil.rmtree(output.parent, ignore_errors=True)
            quantize(
                self._master(base),
                output,
                weight_format,
                target=target,
                group=block,
                table=table,
                calibration=self._calibration(group, weight_format),
                low_rank=[addition(name) for name in deltas],
                progress=progress,
            )
        config = msgspec.structs.replace(
            self._graphs.make(base).config,
            dtype=FORMAT_SPECS[weight_format].compute_dtype(target),
            member_count=len(group),
        )
        parity = {
            spec.name: check_quantized(
                self._graphs.path(spec),
                output,
                config,
                text,
                format=weight_format,
                member=member,
                seed=self._recipe.seed,
                progress=self._context.member_progress(spec),
            )
            for member, spec in enumerate(group)
        }
        return SharedBaseGraph(config, parity)

    def _calibration(self, group: Sequence[MemberRecipe], weight_format: Format) -> list[list[int]]:
        """Return calibration text for a group, about as much as for a single member."""
        each = -(-CALIBRATION_WINDOWS // len(group))
        return [chunk for spec in group for chunk in self._graphs.calibration(spec, weight_format)[:each]]


def _joined(graph: ir.Graph) -> int:
    """Return how many linears of a model the exporter joined into one: 3 where attention reads packed projections."""
    attention = next((node for node in graph if node.op_type == "GroupQueryAttention"), None)
    return 3 if attention is not None and attention.inputs[1] is None else 1


def _table(base: BlockTable | None, deltas: Mapping[str, Sequence[Delta]]) -> BlockTable:
    """Return the base's blocks with those of the additions' first factors."""
    table = base or BlockTable()
    for both in deltas.values():
        down, _ = addition_matrices(both)
        table.add(down, rtn(down, bits=_ADDITION_BITS, block=_ADDITION_BLOCK, symmetric=True))
    return table
