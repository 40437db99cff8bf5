"""Members that are one base and an adapter each, in one graph: the base is stored and read once for all of them."""

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
from edgemix.export.graphs.shared_base import addition, addition_matrices, stack
from edgemix.export.parity.against_fp32 import check_quantized
from edgemix.export.parity.limits import within
from edgemix.export.quantization import quantize
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.rtn import rtn
from edgemix.export.stages.graphs import CALIBRATION_WINDOWS
from edgemix.progress import PrefixedProgress
from edgemix.recipe.schema import MemberRecipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.bundle.writer import BundleWriter
    from edgemix.export.graphs.deltas import Delta
    from edgemix.export.stages.blocks import MemberBlocks
    from edgemix.export.stages.graphs import MemberGraphs
    from edgemix.export.stages.models import MemberModels
    from edgemix.formats import Format
    from edgemix.progress import Progress
    from edgemix.recipe.schema import Recipe

RANKS = (64, 192)
"""Largest rank of what a member adds to a linear of the base, tried in this order until every member passes its gate.
The first one is above what LoRA is trained with; a full fine-tune may need more. Of a linear that the exporter joined
of three it is three times that.
"""

_ADDITION_BITS, _ADDITION_BLOCK = 8, 16
"""How what additions read first is stored in int8 and int4: their second halves stay in floating point."""
_STACKED = ("fp32", "fp16", "int8", "int8-dynamic", "int4")


class Stacked(msgspec.Struct, frozen=True):
    """A graph of several members.

    Attributes:
        config: Of the graph.
        parity: Member name -> how far its row of the graph is from its own fp32 graph.
    """

    config: GraphConfig
    parity: dict[str, QuantizationParity]

    def failing(self) -> list[str]:
        """Names of the members that are over their format's limits."""
        return [name for name, figures in self.parity.items() if not within(figures)]


def groups(recipe: Recipe, models: MemberModels) -> list[tuple[MemberRecipe, ...]]:
    """The recipe's members by the graph that they are to share, in the order of the first of each."""
    found: dict[object, list[MemberRecipe]] = {}
    for spec in recipe.members:
        shares = recipe.stack and spec.prune is None and models.format(spec) in _STACKED
        base = recipe.stack if isinstance(recipe.stack, str) else spec.model
        key = (base, models.format(spec), models.quantization(spec)) if shares else spec.name
        found.setdefault(key, []).append(spec)
    return [tuple(group) for group in found.values()]


class MemberStacks:
    """Makes graphs of several members.

    Args:
        recipe: Checked.
        models: Of its members; so are `graphs` and `blocks`.
        graphs: See `models`.
        blocks: See `models`.
        writer: Of the bundle that is being built.
        progress: Hears of every stage.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        models: MemberModels,
        graphs: MemberGraphs,
        blocks: MemberBlocks,
        writer: BundleWriter,
        progress: Progress,
    ) -> None:
        self._recipe, self._models, self._graphs, self._blocks = recipe, models, graphs, blocks
        self._writer, self._progress = writer, progress

    def base(self, group: Sequence[MemberRecipe]) -> MemberRecipe:
        """What a group's members are additions to."""
        first, named = group[0], self._recipe.stack
        model = named if isinstance(named, str) else first.model
        return MemberRecipe(f"{first.name}@base", model, format=first.format, quantization=first.quantization)

    def place(self, group: Sequence[MemberRecipe]) -> str:
        """The folder in the bundle of a group's graph."""
        return f"stacks/{group[0].name}"

    def make(self, group: Sequence[MemberRecipe], output: Path, text: list[list[int]] | None) -> Stacked | None:
        """Write a group's graph; its members' fp32 graphs are made and stay. None where they cannot be one graph.

        Args:
            group: Two members at least.
            output: The graph.
            text: What parity is measured on.

        Raises:
            As `MemberGraphs.make`.
        """
        base = self.base(group)
        for spec in (*group, base):
            self._graphs.make(spec)
        made = None
        for rank in RANKS:
            try:
                with self._progress.stage(f"stack, rank {rank} at most"):
                    exact, deltas = self._write(base, group, rank)
            except InputError as error:
                names = ", ".join(spec.name for spec in group)
                self._progress.log(f"{names}: a graph for each, not one for all: {error}")
                break
            made = self._quantize(base, group, deltas, output, text)
            if exact or not made.failing():
                break
        shutil.rmtree(self._master(base).parent, ignore_errors=True)
        self._graphs.discard(base)
        return made

    def key(self, group: Sequence[MemberRecipe]) -> str:
        """Of all that a group's graph depends on, but for the text of its gate."""
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
        """Where the fp32 graph of several members lies."""
        return self._writer.scratch / f"{base.name}.stack" / MODEL_FILE

    def _write(
        self, base: MemberRecipe, group: Sequence[MemberRecipe], rank: int
    ) -> tuple[bool, dict[str, list[Delta]]]:
        """Write the fp32 graph of several members: whether it is theirs exactly, and what they add to the base."""
        model, master = ir.load(self._graphs.path(base)), self._master(base)
        members = [ir.load(self._graphs.path(spec)).graph for spec in group]
        most = rank * _joined(model.graph)
        deltas = find_deltas(model.graph, members, most)
        stack(model.graph, deltas, len(group))
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
    ) -> Stacked:
        """Write the graph in its format, and hold each of its members against that one's own."""
        form, target, progress = self._models.format(group[0]), self._recipe.target, self._progress
        table = _table(self._blocks.find(base), deltas) if form in ("int4", "int8") else None
        block = self._models.quantization(group[0]).group
        with progress.stage(form), storage_errors(f"writing {output}"):
            shutil.rmtree(output.parent, ignore_errors=True)
            quantize(
                self._master(base),
                output,
                form,
                target=target,
                group=block,
                table=table,
                calibration=self._calibration(group, form),
                thin=[addition(name) for name in deltas],
                progress=progress,
            )
        config = msgspec.structs.replace(
            self._graphs.make(base).config,
            dtype="float16" if target == "cuda" and form != "fp32" else "float32",
            member_count=len(group),
        )
        parity = {
            spec.name: check_quantized(
                self._graphs.path(spec),
                output,
                config,
                text,
                format=form,
                voice=voice,
                seed=self._recipe.seed,
                progress=PrefixedProgress(progress, spec.name),
            )
            for voice, spec in enumerate(group)
        }
        return Stacked(config, parity)

    def _calibration(self, group: Sequence[MemberRecipe], form: Format) -> list[list[int]]:
        """Text for all of them, as much as one member alone would have."""
        each = -(-CALIBRATION_WINDOWS // len(group))
        return [window for spec in group for window in self._graphs.calibration(spec, form)[:each]]


def _joined(graph: ir.Graph) -> int:
    """How many linears of a model the exporter makes one of: three where attention reads queries, keys and values as
    one.
    """
    attention = next((node for node in graph if node.op_type == "GroupQueryAttention"), None)
    return 3 if attention is not None and attention.inputs[1] is None else 1


def _table(base: BlockTable | None, deltas: Mapping[str, Sequence[Delta]]) -> BlockTable:
    """The base's blocks, and those of what the members' additions read first."""
    table = base or BlockTable()
    for both in deltas.values():
        down, _ = addition_matrices(both)
        table.add(down, rtn(down, bits=_ADDITION_BITS, block=_ADDITION_BLOCK, symmetric=True))
    return table
