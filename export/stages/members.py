"""The members' graphs in their formats, as the bundle holds them, each measured against its fp32 graph."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

from edgemix.bundle.graph_io import GraphConfig
from edgemix.bundle.manifest import STUDENT, MemberEntry, QuantizationParity, SparseWeights
from edgemix.bundle.stages import stage_key
from edgemix.errors import storage_errors
from edgemix.export.graphs.decoder import MODEL_FILE
from edgemix.export.parity.against_fp32 import check_quantized
from edgemix.export.parity.limits import enforce, within
from edgemix.export.parity.mixture import ObservedTexts, keep_distributions
from edgemix.export.pruning.packing import pack_weights
from edgemix.export.quantization import quantize
from edgemix.export.quantization.graph.key_value import cache_scales
from edgemix.export.stages.graphs import GraphRecord
from edgemix.formats import FORMAT_SPECS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemix.export.context import ExportContext
    from edgemix.export.stages.blocks import MemberBlocks
    from edgemix.export.stages.graphs import MemberGraphs
    from edgemix.export.stages.models import MemberModels
    from edgemix.export.stages.shared_base import SharedBaseGraphs
    from edgemix.recipe.schema import MemberRecipe


class StoredMember(msgspec.Struct, frozen=True):
    """A member's graph as the bundle holds it.

    Attributes:
        graph: The record of its fp32 graph.
        config: The stored graph's.
        parity: How far the stored graph is from the fp32 graph; None for fp32.
        sparse: Set where weights are stored without their zeros.
        eight_bits: Share of the weights that have 8 bits where others have 4.
        folder: The folder in the bundle of a graph that several members share; None for a graph of its own.
    """

    graph: GraphRecord
    config: GraphConfig
    parity: QuantizationParity | None
    sparse: SparseWeights | None = None
    eight_bits: float = 0.0
    folder: str | None = None


class MemberExporter:
    """Writes members' graphs to the bundle.

    Args:
        context: The export.
        models: The members' torch models.
        graphs: The members' fp32 graphs.
        blocks: The members' quantized blocks.
        shared: Graphs that several members share.
        texts: Token ids that parity is measured on; None lets each fp32 graph write some.
        mixture_texts: Token ids that the mixture is compared on; may be empty.
        eight_bits: Member name -> linears that get 8 bits in int4, where that is decided already.
    """

    def __init__(
        self,
        context: ExportContext,
        *,
        models: MemberModels,
        graphs: MemberGraphs,
        blocks: MemberBlocks,
        shared: SharedBaseGraphs,
        texts: list[list[int]] | None,
        mixture_texts: list[list[int]],
        eight_bits: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._context, self._models, self._graphs, self._blocks, self._shared = context, models, graphs, blocks, shared
        self._texts, self._mixture_texts, self._eight_bits = texts, mixture_texts, eight_bits

    def export_group(self, group: tuple[MemberRecipe, ...]) -> dict[str, StoredMember]:
        """Export members that may share a graph: those that can as one, each of the others by itself."""
        context, records = self._context, dict[str, StoredMember]()
        sharing = group
        while len(sharing) > 1:
            records = self._export_shared(sharing)
            failing = {name for name, record in records.items() if record.parity and not within(record.parity)}
            if not failing or context.force:
                break
            context.progress.log(f"{', '.join(sorted(failing))}: exported alone; a shared graph would lose too much")
            shutil.rmtree(context.writer.folder / self._shared.folder(sharing))
            sharing, records = tuple(spec for spec in sharing if spec.name not in failing), {}
        alone = [spec for spec in group if spec.name not in records]
        return records | {spec.name: self.export(spec) for spec in alone}

    def export(self, spec: MemberRecipe, *, in_mixture: bool = True) -> StoredMember:
        """Export one member: load and merge, fp32 graph, format, parity.

        Args:
            spec: The member, or the student.
            in_mixture: Whether it takes part in the comparison of mixtures.
        """
        texts = self._mixture_texts if in_mixture else []
        folder, weight_format = self._context.writer.folder / own_folder(spec), self._models.format(spec)
        key = stage_key(
            graph=self._graphs.key(spec),
            format=weight_format,
            quantization=self._models.quantization(spec) if FORMAT_SPECS[weight_format].block_bits else None,
            cache=self._context.recipe.cache,
            eight_bits=self._eight_bits.get(spec.name),
            data=self._models.data_digest(),
            text=self._texts,
            mixed=texts,
            seed=self._context.recipe.seed,
        )

        def make() -> StoredMember:
            observed = ObservedTexts(texts)
            record = self._quantize(spec, folder, observed)
            if record.parity is not None:
                self._keep_distributions(spec, record.graph, texts, observed)
            if record.graph.sparse:
                sparse = pack_weights(folder / MODEL_FILE, self._context.member_progress(spec))
                record = msgspec.structs.replace(record, sparse=sparse)
            return record

        return self._context.stage(
            f"member/{spec.name}",
            key,
            make,
            StoredMember,
            files=[folder, self.distributions(spec)],
            cleanup=lambda: self._graphs.discard(spec),
        )

    def distributions(self, spec: MemberRecipe) -> Path:
        """Return the file with the distributions of a member's fp32 graph."""
        return self._context.writer.scratch / f"{spec.name}.distributions.safetensors"

    def entry(self, spec: MemberRecipe, stored: StoredMember) -> MemberEntry:
        """Return a member's entry in the manifest.

        Raises:
            ParityError: It is over its limits, and the export is not forced.
        """
        graph, figures, context = stored.graph, stored.parity, self._context
        gates = [gate for gate in (graph.pruning, graph.parity, figures) if gate is not None]
        exceeded = [enforce(gate, forced=context.force, member=spec.name) for gate in gates]
        forced = any(exceeded)
        if forced:
            context.progress.log(f"{spec.name}: over its parity limits, kept because the export is forced")
        return MemberEntry(
            name=spec.name,
            format=self._models.format(spec),
            graph=f"{stored.folder or own_folder(spec)}/{MODEL_FILE}",
            source=graph.source,
            config=stored.config,
            parity=graph.parity,
            quantization=figures,
            fallbacks=graph.fallbacks,
            forced=forced,
            pruning=graph.pruning,
            sparse=stored.sparse,
            eight_bits=stored.eight_bits,
        )

    def _export_shared(self, group: tuple[MemberRecipe, ...]) -> dict[str, StoredMember]:
        """Export one graph for several members; an empty result where they cannot share one."""
        context, folder, records = self._context, self._shared.folder(group), dict[str, StoredMember]()

        def make() -> dict[str, StoredMember]:
            made = self._shared.make(group, context.writer.folder / folder / MODEL_FILE, self._texts)
            if made is None:
                return records
            for spec in group:
                graph = self._graphs.make(spec)
                records[spec.name] = StoredMember(graph, made.config, made.parity[spec.name], folder=folder)
                self._keep_distributions(spec, graph, self._mixture_texts)
            return records

        def cleanup() -> None:
            for spec in group if records else ():
                self._graphs.discard(spec)

        key = stage_key(graph=self._shared.key(group), text=self._texts, mixed=self._mixture_texts)
        files = [context.writer.folder / folder, *map(self.distributions, group)]
        name = f"stack/{'+'.join(spec.name for spec in group)}"
        return context.stage(name, key, make, dict[str, StoredMember], files=files, cleanup=cleanup)

    def _keep_distributions(
        self, spec: MemberRecipe, graph: GraphRecord, texts: list[list[int]], observed: ObservedTexts | None = None
    ) -> None:
        if texts:
            path, output = self._graphs.path(spec), self.distributions(spec)
            rows, progress = observed.rows if observed else None, self._context.member_progress(spec)
            keep_distributions(path, graph.config, texts, output, observed=rows, progress=progress)

    def _quantize(self, spec: MemberRecipe, folder: Path, observed: ObservedTexts) -> StoredMember:
        """Write a member's graph in its format, and measure how far it is from the fp32 graph."""
        context, graph, quantization = self._context, self._graphs.make(spec), self._models.quantization(spec)
        weight_format, target, seed = self._models.format(spec), context.recipe.target, context.recipe.seed
        source, output, progress = self._graphs.path(spec), folder / MODEL_FILE, context.member_progress(spec)
        shutil.rmtree(folder, ignore_errors=True)
        int8_cache = context.recipe.cache == "int8"
        calibration = self._graphs.calibration(spec, weight_format, needed=int8_cache)
        scales = (
            cache_scales(source, graph.config, calibration, progress=progress) if int8_cache and calibration else None
        )
        eight_bits = self._eight_bits.get(spec.name)
        table = self._blocks.find(spec, eight_bits)
        with progress.stage(weight_format), storage_errors(f"writing {output}"):
            quantize(
                source,
                output,
                weight_format,
                target=target,
                algorithm="hqq" if quantization.algorithm == "hqq" else "rtn",
                group=quantization.group,
                table=table,
                calibration=calibration,
                cache=scales,
                progress=progress,
            )
        config = msgspec.structs.replace(
            graph.config,
            dtype=FORMAT_SPECS[weight_format].compute_dtype(target),
            cache_dtype="int8" if int8_cache else None,
        )
        if FORMAT_SPECS[weight_format].reference:
            return StoredMember(graph, config, None)
        share = table.share(8) if table is not None and (eight_bits or quantization.eight_bits) else 0.0
        figures = check_quantized(
            source,
            output,
            config,
            self._texts,
            format=weight_format,
            seed=seed,
            observe=observed.add,
            progress=progress,
        )
        return StoredMember(graph, config, figures, eight_bits=share)


def own_folder(spec: MemberRecipe) -> str:
    """Return the folder in the bundle of a member's own graph, or of the student's."""
    return STUDENT if spec.name == STUDENT else f"members/{spec.name}"
