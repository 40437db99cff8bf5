"""The members' fp32 graphs, each made once and stored in the scratch until the member's format is written."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

import edgemix
from edgemix.bundle.graph_io import GraphConfig
from edgemix.bundle.manifest import GraphParity, ModelSource, PruningFigures
from edgemix.bundle.stages import stage_key
from edgemix.errors import storage_errors
from edgemix.export.data.text import check_tokens
from edgemix.export.graphs.decoder import MODEL_FILE, export_graph
from edgemix.export.models.loading import end_ids, member_tokenizer, versions
from edgemix.export.models.tokenizers import check_rows
from edgemix.export.parity.against_fp32 import sample_texts
from edgemix.export.pruning.report import sparsity
from edgemix.formats import FORMAT_SPECS

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.export.context import ExportContext
    from edgemix.export.stages.models import MemberModels
    from edgemix.formats import Format
    from edgemix.recipe.schema import MemberRecipe

CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 32, 256
"""Number and tokens of the chunks of calibration text for int8-dynamic."""
GATE_TOKENS = 2_048
"""Tokens of text, over all domains, on which quantized graphs are compared with fp32 graphs."""
SPARSE = 0.2
"""Share of zeros above which weights are stored without them; models that were not pruned have less."""


class GraphRecord(msgspec.Struct, frozen=True):
    """The config and figures of a member's fp32 graph, and what else is read from the loaded model."""

    source: ModelSource
    config: GraphConfig
    parity: GraphParity
    fallbacks: tuple[str, ...]
    eos: tuple[int, ...]
    pruning: PruningFigures | None = None
    sparsity: float = 0.0

    @property
    def sparse(self) -> bool:
        """Whether weights are stored without their zeros."""
        return self.sparsity > SPARSE


class MemberGraphs:
    """Make members' fp32 graphs in the writer's scratch.

    Args:
        context: The export.
        models: The members' models.
    """

    def __init__(self, context: ExportContext, models: MemberModels) -> None:
        self._context, self._recipe, self._models = context, context.recipe, models
        self._windows: dict[str, list[list[int]]] = {}

    def key(self, spec: MemberRecipe) -> str:
        """Return the cache key of a member's graph."""
        return stage_key(
            weights=self._models.key(spec),
            target=self._recipe.target,
            **({} if self._recipe.context is None else {"context": self._recipe.context}),
            versions=versions() | {"edgemix": edgemix.__version__},
        )

    def path(self, spec: MemberRecipe) -> Path:
        """Return the file of a member's graph, which `make` writes."""
        return self._context.writer.scratch / spec.name / MODEL_FILE

    def make(self, spec: MemberRecipe) -> GraphRecord:
        """Make a member's graph, or return the record of the stored one.

        Raises:
            InputError: The member cannot be read, or has too few logits for its tokenizer.
            ParityError: No graph is close enough to the model.
            EdgemixError: No exporter knows the model.
        """
        name, files = f"graph/{spec.name}", [self.path(spec).parent]
        return self._context.stage(name, self.key(spec), lambda: self._make(spec), GraphRecord, files=files)

    def calibration(self, spec: MemberRecipe, weight_format: Format, *, needed: bool = False) -> list[list[int]]:
        """Return chunks of calibration text, as token ids, on which a format's quantization observes activations.

        Args:
            spec: The member.
            weight_format: Its format; int8-dynamic needs chunks.
            needed: Whether something else needs them. Without text, they are sampled from the member's graph.

        Raises:
            As `make`.
        """
        calibration = FORMAT_SPECS[weight_format].calibration
        needed = needed or calibration == "required"
        if not needed and calibration == "none":
            return []
        config = self.make(spec).config
        if spec.name not in self._windows:  # a budget asks for each candidate
            tokenizer = member_tokenizer(spec, self._recipe.folder)
            length = min(CALIBRATION_LENGTH, config.context)
            found = self._models.calibration(tokenizer, spec.name, length, CALIBRATION_WINDOWS)
            check_tokens(found, tokenizer, config.vocabulary, spec.name)
            self._windows[spec.name] = found
        if (found := self._windows[spec.name]) or not needed:
            return found
        return sample_texts(self.path(spec), config, GATE_TOKENS, seed=self._recipe.seed)

    def discard(self, spec: MemberRecipe) -> None:
        """Remove a member's graph."""
        shutil.rmtree(self.path(spec).parent)

    def _make(self, spec: MemberRecipe) -> GraphRecord:
        pruning, member, folder = self._models.prune(spec), self._models.load(spec), self.path(spec).parent
        check_rows(member.tokenizer, member.model.config.get_text_config().vocab_size, spec.name)
        progress, force = self._context.member_progress(spec), self._context.force
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
        with progress.stage("graph"), storage_errors(f"writing {folder}"):
            graph = export_graph(
                member.model,
                folder,
                target=self._recipe.target,
                context=self._recipe.context,
                force=force,
                progress=progress,
            )
        ends = end_ids(member)
        found = graph.config, graph.parity, graph.fallbacks, tuple(sorted(ends))
        return GraphRecord(member.source, *found, pruning, sparsity(member.model))
