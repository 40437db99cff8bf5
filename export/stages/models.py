"""The torch models that a recipe's graphs are written of: loaded, pruned, prepared for quantisation, each step kept."""

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
from edgemix.progress import PrefixedProgress, Progress
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.bundle.writer import BundleWriter
    from edgemix.formats import Format
    from edgemix.recipe.compression import Quantization
    from edgemix.recipe.schema import MemberRecipe, Recipe


class MemberModels:
    """Makes members' models as they are exported; what took long lies in the writer's scratch.

    Args:
        recipe: Checked.
        writer: Of the bundle that is being built.
        force: Let a pruned model pass that is over its limits.
        progress: Hears of every stage.
    """

    def __init__(self, recipe: Recipe, writer: BundleWriter, force: bool, progress: Progress) -> None:
        self._recipe, self._writer, self._force, self._progress = recipe, writer, force, progress
        self._loader = MemberLoader(recipe.folder, progress)
        self._digest = cache(Location.sha256)

    def format(self, spec: MemberRecipe) -> Format:
        return spec.format or self._recipe.format

    def quantization(self, spec: MemberRecipe) -> Quantization:
        return spec.quantization or self._recipe.quantization

    def key(self, spec: MemberRecipe) -> str:
        """Of all that a member's weights depend on."""
        prepared = self._prepares(spec)
        return stage_key(
            pruned=self._pruned_key(spec),
            prepared=self.quantization(spec) if prepared else None,
            text=self.data_digest() if prepared else None,
            seed=self._recipe.seed if prepared else None,
        )

    def load(self, spec: MemberRecipe) -> LoadedMember:
        """A member as its graph is written: pruned, rotated and scaled where the recipe says so.

        Raises:
            InputError: Its files cannot be read, or its structure does not allow what the recipe wants.
            ParityError: It is over the limits of pruning, and nothing is forced.
        """
        if self._prepares(spec):
            return dataclasses.replace(self._loader.load(spec), model=self._read(self._prepared(spec), spec))
        return self._load_pruned(spec)

    def prune(self, spec: MemberRecipe) -> PruningFigures | None:
        """What pruning did to a member, if the recipe says so; it has passed the gate or was forced."""
        if spec.prune is None:
            return None
        key, stages, output = self._pruned_key(spec), self._writer.stages, self._pruned(spec)
        figures = stages.done(f"prune/{spec.name}", key, PruningFigures)
        if figures is None:
            member = self._loader.load(spec)
            progress, scratch = PrefixedProgress(self._progress, spec.name), output.with_name(f"{spec.name}.pruning")
            figures = prune_member(member, spec.prune, self._recipe, output, scratch=scratch, progress=progress)
            stages.mark_done(f"prune/{spec.name}", key, figures, files=[output])
        enforce(figures, forced=self._force, member=spec.name)
        return figures

    def has_text(self) -> bool:
        """Whether the recipe has text that quantisation may look at."""
        return bool(self._recipe.data.calibration or self._recipe.data.training)

    def data_digest(self) -> str:
        """Of the texts that quantisation may look at."""
        return stage_key(texts=self._domains())

    def calibration(self, tokenizer: PreTrainedTokenizerBase, name: str, length: int, count: int) -> list[list[int]]:
        """Windows of the calibration text (of the training text where there is none) for one member; none where there
        is no text.
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
        form, quantization = self.format(spec), self.quantization(spec)
        return (quantization.rotate and form in ("int4", "int8-dynamic")) or (quantization.scale and form == "int4")

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
        """Where a member's pruned model lies."""
        return self._writer.scratch / f"{spec.name}.pruned"

    def _prepared(self, spec: MemberRecipe) -> Path:
        """Where a member's prepared model lies; it is made first if it is not there."""
        folder = self._writer.scratch / f"{spec.name}.prepared"
        key, stages, quantization = self.key(spec), self._writer.stages, self.quantization(spec)
        if not stages.done(f"prepare/{spec.name}", key, bool):
            member, progress = self._load_pruned(spec), PrefixedProgress(self._progress, spec.name)
            text = self.calibration(member.tokenizer, spec.name, LENGTH, WINDOWS) if quantization.scale else []
            model = prepare_model(member.model, quantization, text, seed=self._recipe.seed, progress=progress)
            with storage_errors(f"writing {folder}"):
                shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
                model.save_pretrained(folder)
            stages.mark_done(f"prepare/{spec.name}", key, files=[folder])
        return folder

    def _read(self, folder: Path, spec: MemberRecipe) -> PreTrainedModel:
        return load_model(Location(folder, None, spec.name))
