"""The torch models that graphs are made from: loaded, pruned and prepared for quantization; each step is stored."""

from __future__ import annotations

import dataclasses
import shutil
from functools import cache
from typing import TYPE_CHECKING

from edgemix.bundle.manifest import PruningFigures
from edgemix.bundle.stages import stage_key
from edgemix.errors import storage_errors
from edgemix.export.data.text import calibration_windows
from edgemix.export.models.loading import LoadedMember, MemberLoader, load_model, versions
from edgemix.export.models.location import Location, locate
from edgemix.export.parity.limits import enforce
from edgemix.export.pruning.prune import prune_member, pruning_domains
from edgemix.export.quantization.statistics.calibration import LENGTH, WINDOWS
from edgemix.export.quantization.transforms.preparation import prepare_model
from edgemix.formats import FORMAT_SPECS
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.export.context import ExportContext
    from edgemix.formats import Format
    from edgemix.recipe.compression import Quantization
    from edgemix.recipe.schema import MemberRecipe


class MemberModels:
    """Make members' models as they are exported; pruned and prepared ones are stored in the writer's scratch.

    Args:
        context: The export.
    """

    def __init__(self, context: ExportContext) -> None:
        self._context, self._recipe, self._scratch = context, context.recipe, context.writer.scratch
        self._loader = MemberLoader(context.recipe.folder, context.progress)
        self._digest = cache(Location.sha256)
        self._data_digest: str | None = None

    def format(self, spec: MemberRecipe) -> Format:
        """Return a member's weight format: its own, or the recipe's."""
        return spec.format or self._recipe.format

    def quantization(self, spec: MemberRecipe) -> Quantization:
        """Return a member's quantization settings: its own, or the recipe's."""
        return spec.quantization or self._recipe.quantization

    def key(self, spec: MemberRecipe) -> str:
        """Return the cache key of a member's weights."""
        prepared = self._prepares(spec)
        return stage_key(
            pruned=self._pruned_key(spec),
            prepared=self.quantization(spec) if prepared else None,
            text=self.data_digest() if prepared else None,
            seed=self._recipe.seed if prepared else None,
        )

    def load(self, spec: MemberRecipe) -> LoadedMember:
        """Load a member as it is exported: pruned, rotated and scaled if the recipe says so.

        Raises:
            InputError: Its files cannot be read, or its structure does not allow what the recipe wants.
            ParityError: It is over the limits of pruning, and nothing is forced.
        """
        if self._prepares(spec):
            return dataclasses.replace(self._loader.load(spec), model=self._read(self._prepared(spec), spec))
        return self._load_pruned(spec)

    def prune(self, spec: MemberRecipe) -> PruningFigures | None:
        """Prune a member if the recipe says so; the figures have passed their limits or were forced."""
        if spec.prune is None:
            return None
        output, scratch, settings = self._pruned(spec), self._scratch / f"{spec.name}.pruning", spec.prune

        def make() -> PruningFigures:
            member, progress = self._loader.load(spec), self._context.member_progress(spec)
            return prune_member(member, settings, self._recipe, output, scratch=scratch, progress=progress)

        key = self._pruned_key(spec)
        figures = self._context.stage(f"prune/{spec.name}", key, make, PruningFigures, files=[output])
        enforce(figures, forced=self._context.force, member=spec.name)
        return figures

    def has_text(self) -> bool:
        """Return whether the recipe has calibration text, or training text in its place."""
        return bool(self._recipe.data.calibration or self._recipe.data.training)

    def data_digest(self) -> str:
        """Return the digest of the calibration texts, which are read once."""
        if self._data_digest is None:
            self._data_digest = stage_key(texts=self._domains())
        return self._data_digest

    def calibration(self, tokenizer: PreTrainedTokenizerBase, name: str, length: int, count: int) -> list[list[int]]:
        """Return chunks of the calibration text (of the training text if there is none) for one member.

        Args:
            tokenizer: The member's.
            name: The member's; a domain of that name counts as much as all others.
            length: Tokens of a chunk.
            count: About how many chunks.

        Returns:
            Token ids; empty without text.
        """
        domains = self._domains()
        if not domains:
            return []
        return calibration_windows(domains, tokenizer, length, count, name=name, seed=self._recipe.seed)

    def _domains(self) -> dict[str, list[str]]:
        data = self._recipe.data
        sources = data.calibration or data.training
        return {domain: read_documents(source, self._recipe.folder) for domain, source in sources.items()}

    def _prepares(self, spec: MemberRecipe) -> bool:
        row, quantization = FORMAT_SPECS[self.format(spec)], self.quantization(spec)
        return (quantization.rotate and row.rotatable) or (quantization.scale and row.mixed_bits)

    def _pruned_key(self, spec: MemberRecipe) -> str:
        parts = [self._digest(locate(part, self._recipe.folder)) for part in (spec.model, spec.adapter) if part]
        if spec.prune is None:
            return stage_key(parts=parts)
        domains, seed = pruning_domains(self._recipe), self._recipe.seed
        return stage_key(parts=parts, prune=spec.prune, domains=domains, versions=versions(), seed=seed)

    def _load_pruned(self, spec: MemberRecipe) -> LoadedMember:
        member = self._loader.load(spec)
        if spec.prune is None:
            return member
        self.prune(spec)
        return dataclasses.replace(member, model=self._read(self._pruned(spec), spec))

    def _pruned(self, spec: MemberRecipe) -> Path:
        """Return the folder of a member's pruned model."""
        return self._scratch / f"{spec.name}.pruned"

    def _prepared(self, spec: MemberRecipe) -> Path:
        """Return the folder of a member's rotated and scaled model, which is made if it is not there."""
        folder, quantization = self._scratch / f"{spec.name}.prepared", self.quantization(spec)

        def make() -> bool:
            member, progress = self._load_pruned(spec), self._context.member_progress(spec)
            text = self.calibration(member.tokenizer, spec.name, LENGTH, WINDOWS) if quantization.scale else []
            model = prepare_model(member.model, quantization, text, seed=self._recipe.seed, progress=progress)
            with storage_errors(f"writing {folder}"):
                shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
                model.save_pretrained(folder)
            return True

        self._context.stage(f"prepare/{spec.name}", self.key(spec), make, bool, files=[folder])
        return folder

    def _read(self, folder: Path, spec: MemberRecipe) -> PreTrainedModel:
        return load_model(Location(folder, None, spec.name))
