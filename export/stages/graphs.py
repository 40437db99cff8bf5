"""The fp32 graphs of a recipe's members, each made once and kept in the scratch until its format is written."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

import edgemix
from edgemix.bundle.graph_io import GraphConfig
from edgemix.bundle.manifest import GraphParity, ModelSource, PruningFigures
from edgemix.bundle.stages import stage_key
from edgemix.errors import InputError, storage_errors
from edgemix.export.graphs.decoder import MODEL_FILE, export_graph
from edgemix.export.models.loading import end_ids, load_tokenizer, versions
from edgemix.export.models.location import locate
from edgemix.export.models.tokenizers import tokenizer_size
from edgemix.export.parity.against_fp32 import own_texts
from edgemix.export.pruning.report import sparsity
from edgemix.progress import PrefixedProgress, Progress

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.bundle.writer import BundleWriter
    from edgemix.export.stages.models import MemberModels
    from edgemix.formats import Format
    from edgemix.recipe.schema import MemberRecipe, Recipe

CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 32, 256
"""What int8-dynamic looks at."""
GATE_TOKENS = 2_048
"""Tokens of text that the gate after quantisation reads, over all domains."""
SPARSE = 0.2
"""Share of zeros from which weights are stored without them; a model that nobody pruned has less."""


class GraphRecord(msgspec.Struct, frozen=True):
    """The fp32 graph's config and figures, and what the loaded model told on the way."""

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
    """Makes members' fp32 graphs; they lie in the writer's scratch.

    Args:
        recipe: Checked.
        models: Of its members.
        writer: Of the bundle that is being built.
        force: Take the first graph that runs where none passes its gate.
        progress: Hears of every stage.
    """

    def __init__(
        self, recipe: Recipe, models: MemberModels, writer: BundleWriter, *, force: bool, progress: Progress
    ) -> None:
        self._recipe, self._models, self._writer = recipe, models, writer
        self._force, self._progress = force, progress
        self._windows: dict[str, list[list[int]]] = {}

    def key(self, spec: MemberRecipe) -> str:
        """Of all that a member's graph depends on."""
        return stage_key(
            weights=self._models.key(spec),
            target=self._recipe.target,
            versions=versions() | {"edgemix": edgemix.__version__},
        )

    def path(self, spec: MemberRecipe) -> Path:
        """Where a member's graph lies once it is made."""
        return self._writer.scratch / spec.name / MODEL_FILE

    def make(self, spec: MemberRecipe) -> GraphRecord:
        """A member's graph, if it is not there yet.

        Raises:
            InputError: The member cannot be read, or has too few logits for its tokenizer.
            ParityError: No graph is the model.
            EdgemixError: No exporter knows the model.
        """
        key, stages = self.key(spec), self._writer.stages
        record = stages.done(f"graph/{spec.name}", key, GraphRecord)
        if record is None:
            record = self._make(spec)
            stages.mark_done(f"graph/{spec.name}", key, record, files=[self.path(spec).parent])
        return record

    def calibration(self, spec: MemberRecipe, form: Format, *, needed: bool = False) -> list[list[int]]:
        """Windows of token ids that a format looks at activations on: calibration text, where there is some.

        Args:
            spec: The member.
            form: Its format; int8-dynamic needs windows.
            needed: Whether something else needs them. Where there is no text, they are what the member's graph writes.

        Raises:
            As `make`.
        """
        needed = needed or form == "int8-dynamic"
        if not needed and form not in ("int8", "int4"):
            return []
        config = self.make(spec).config
        if spec.name not in self._windows:  # every trial of a budget asks
            tokenizer = load_tokenizer(locate(spec.model, self._recipe.folder))
            length = min(CALIBRATION_LENGTH, config.context)
            self._windows[spec.name] = self._models.calibration(tokenizer, spec.name, length, CALIBRATION_WINDOWS)
        if (found := self._windows[spec.name]) or not needed:
            return found
        return own_texts(self.path(spec), config, GATE_TOKENS, seed=self._recipe.seed)

    def discard(self, spec: MemberRecipe) -> None:
        """Remove a member's graph, which nobody needs any more."""
        shutil.rmtree(self.path(spec).parent)

    def _make(self, spec: MemberRecipe) -> GraphRecord:
        pruning, member, folder = self._models.prune(spec), self._models.load(spec), self.path(spec).parent
        logits, ids = member.model.config.get_text_config().vocab_size, tokenizer_size(member.tokenizer)
        if logits < ids:
            raise InputError(
                f"member {spec.name}: the model has {logits} logits, but its tokenizer has {ids} token ids",
                "Give the tokenizer that the model was trained with, or resize the model's embeddings.",
            )
        progress = PrefixedProgress(self._progress, spec.name)
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        with progress.stage("graph"), storage_errors(f"writing {folder}"):
            graph = export_graph(member.model, folder, target=self._recipe.target, force=self._force, progress=progress)
        ends = end_ids(member)
        found = graph.config, graph.parity, graph.fallbacks, tuple(sorted(ends))
        return GraphRecord(member.source, *found, pruning, sparsity(member.model))
