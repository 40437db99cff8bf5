"""From a recipe over labels to a bundle: members, their temperatures, the weights of the mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import edgemix
from edgemix.bundle.label_bundle.manifest import LabelManifest
from edgemix.bundle.manifest import SCHEMA
from edgemix.bundle.writer import BundleWriter
from edgemix.errors import InputError, RecipeError
from edgemix.export.labels.examples import RecipeExamples
from edgemix.export.labels.fitting import fit_label_mixture
from edgemix.export.labels.members import LabelMemberExporter
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models.loading import versions
from edgemix.export.stages.weights import given_weights
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.load import check

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemix.bundle.label_bundle.manifest import LabelMember
    from edgemix.recipe.labels import LabelRecipe


def export_label_bundle(
    recipe: LabelRecipe,
    output: Path,
    *,
    force: bool = False,
    strict: bool = False,
    progress: Progress = NO_PROGRESS,
) -> LabelManifest:
    """Build the bundle that a recipe over labels describes.

    Args:
        recipe: What to build; from `load_any_recipe`, or made in Python.
        output: The bundle's folder. An existing bundle is replaced in one step when the new one is complete.
        force: Accept a format that is over its parity limits; the manifest records it.
        strict: Raise an InputError for what libraries warn about while they read a member; otherwise it is logged.
        progress: Progress callback.

    Raises:
        RecipeError: The recipe has mistakes.
        InputError: A member or an example cannot be read, or a label is none of the mixture's.
        ParityError: A graph is further from its source than its format allows.
        EdgemixError: A disk is full.
    """
    if problems := check(recipe):
        raise RecipeError("\n".join(["the recipe has mistakes:", *problems]))
    with BundleWriter(output) as writer, library_warnings(progress, strict=strict):
        examples = RecipeExamples.read(recipe)
        exporter = LabelMemberExporter(recipe, writer, examples, force=force, progress=progress)
        members = tuple(exporter.export(spec) for spec in recipe.members)
        manifest = LabelManifest(
            schema=SCHEMA,
            edgemix=edgemix.__version__,
            target=recipe.target,
            seed=recipe.seed,
            task=recipe.task,
            members=members,
            labels=mixture_labels(recipe, members),
            multi_label=recipe.multi_label,
            weights=given_weights(recipe),
            combine=recipe.combine,
            files={},
            versions=versions(),
        )
        if examples.validation:
            _check_labels(manifest, examples)
            manifest = fit_label_mixture(writer.folder, manifest, recipe, examples, progress)
        return writer.finish(manifest, progress)


def mixture_labels(recipe: LabelRecipe, members: Sequence[LabelMember]) -> tuple[str, ...]:
    """Return the mixture's labels: the recipe's, or those of the members in the order of their first use.

    Raises:
        InputError: Members have no label in common, so that nothing is mixed.
    """
    found = recipe.labels or tuple(dict.fromkeys(label for member in members for label in member.labels))
    for member in members[1:]:
        if member.labels and not set(member.labels) & set(members[0].labels):
            raise InputError(
                f"{members[0].name} and {member.name} have no label in common: {', '.join(members[0].labels)}; "
                f"{', '.join(member.labels)}",
                "Map their names to common ones under labels: of a member.",
            )
    return found


def _check_labels(manifest: LabelManifest, examples: RecipeExamples) -> None:
    """Raise an InputError for labels of examples that the mixture does not have."""
    if manifest.task == "fill-mask":
        return
    for domain, found in examples.validation.items():
        unknown = {label for example in found for label in example.labels or ()} - set(manifest.labels)
        if unknown:
            raise InputError(
                f"data.validation.{domain}: its labels {', '.join(sorted(unknown)[:10])} are none of the mixture's, "
                f"which are {', '.join(manifest.labels[:20])}",
                "Map the members' labels to those of the examples under labels: of each member.",
            )
