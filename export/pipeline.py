"""From a recipe to a bundle: the stages of an export in order, each of which is stored as soon as it is done.

An interrupted export leaves its staging folder beside the output. The next one continues from it: every stage whose
inputs are the same, down to the bytes of the weights, is taken from there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

import edgemix
from edgemix.bundle.manifest import SCHEMA, BudgetFigures, Manifest
from edgemix.bundle.writer import BundleWriter
from edgemix.errors import RecipeError
from edgemix.export.budget.candidates import CandidateGraphs
from edgemix.export.budget.check import check_budget
from edgemix.export.budget.planner import FormatPlanner, with_initial_formats, with_planned_formats
from edgemix.export.context import ExportContext
from edgemix.export.drafting.ngrams import write_ngrams
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models import tokenizers
from edgemix.export.models.loading import versions
from edgemix.export.stages.blocks import MemberBlocks
from edgemix.export.stages.graphs import MemberGraphs
from edgemix.export.stages.inputs import gate_texts, mixture_texts, share_tokenizer
from edgemix.export.stages.members import MemberExporter
from edgemix.export.stages.mixture import fitted_weights, mixture_parity
from edgemix.export.stages.models import MemberModels
from edgemix.export.stages.shared_base import SharedBaseGraphs, groups
from edgemix.export.stages.student import export_student
from edgemix.export.stages.weights import given_weights
from edgemix.formats import FORMAT_SPECS
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.load import check

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from edgemix.export.budget.plan import ResourceBudget
    from edgemix.recipe.schema import Recipe


def export_bundle(
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    strict: bool = False,
    budget: ResourceBudget | None = None,
    progress: Progress = NO_PROGRESS,
) -> Manifest:
    """Build the bundle that `recipe` describes.

    Args:
        recipe: What to build; from `load_recipe`, or made in Python.
        output: The bundle's folder. An existing bundle is replaced in one step when the new one is complete.
        force: Accept a format that is over its parity limits; the manifest records it.
        strict: Raise an InputError for what libraries warn about while they read a member; otherwise it is logged.
        budget: Limits within which formats are chosen, layer by layer, for the members that have no own format.
        progress: Progress callback.

    Raises:
        RecipeError: The recipe has mistakes.
        InputError: A member cannot be read, the members do not share one tokenizer, or no choice is within the budget.
        ParityError: A graph is further from its source than its format allows.
        EdgemixError: No exporter knows a model type, a disk is full, or the bundle is over its budget in the end.
    """
    if problems := check(recipe):
        raise RecipeError("\n".join(["the recipe has mistakes:", *problems]))
    with BundleWriter(output) as writer, library_warnings(progress, strict=strict):
        context = ExportContext(recipe, writer, force, progress, strict)
        manifest = _build(context, _read_inputs(context)) if budget is None else _build_within(context, budget)
        return writer.finish(manifest, progress)


class _Inputs(NamedTuple):
    """The inputs that are read before any member is exported.

    Attributes:
        tokenizer: The members'.
        ngrams: Number of n-grams in the bundle.
        texts: Token ids that parity is measured on; None lets each fp32 graph write some.
        mixture_texts: Token ids that the mixture is compared on.
    """

    tokenizer: PreTrainedTokenizerBase
    ngrams: int
    texts: list[list[int]] | None
    mixture_texts: list[list[int]]


def _read_inputs(context: ExportContext) -> _Inputs:
    tokenizer = share_tokenizer(context)
    ngrams = write_ngrams(context, tokenizer)
    texts = gate_texts(context, tokenizer)
    models = MemberModels(context)
    mixed = mixture_texts(context, models, MemberGraphs(context, models), texts, tokenizer)
    return _Inputs(tokenizer, ngrams, texts, mixed)


class _Members(NamedTuple):
    """The makers of members' models and graphs, for one recipe."""

    models: MemberModels
    graphs: MemberGraphs
    blocks: MemberBlocks
    exporter: MemberExporter

    @classmethod
    def of(
        cls, context: ExportContext, inputs: _Inputs, eight_bits: Mapping[str, tuple[str, ...]] | None = None
    ) -> _Members:
        models = MemberModels(context)
        graphs, blocks = MemberGraphs(context, models), MemberBlocks(context, models)
        exporter = MemberExporter(
            context,
            models=models,
            graphs=graphs,
            blocks=blocks,
            shared=SharedBaseGraphs(context, models=models, graphs=graphs, blocks=blocks),
            texts=inputs.texts,
            mixture_texts=inputs.mixture_texts,
            eight_bits=eight_bits or {},
        )
        return cls(models, graphs, blocks, exporter)


def _build(
    context: ExportContext, inputs: _Inputs, eight_bits: Mapping[str, tuple[str, ...]] | None = None
) -> Manifest:
    """Export the members, weights and student of a recipe whose formats are chosen; the manifest lacks checksums."""
    recipe, members = context.recipe, _Members.of(context, inputs, eight_bits)
    models, exporter = members.models, members.exporter
    stored = {name: each for group in groups(recipe, models) for name, each in exporter.export_group(group).items()}
    specs = {spec.name: spec for spec in recipe.members}
    eos = {end for each in stored.values() for end in each.graph.eos}
    manifest = Manifest(
        schema=SCHEMA,
        edgemix=edgemix.__version__,
        target=recipe.target,
        seed=recipe.seed,
        members=tuple(exporter.entry(specs[name], each) for name, each in stored.items()),
        weights=given_weights(recipe),
        tokenizer=tokenizers.describe(inputs.tokenizer, eos),
        files={},
        versions=versions(),
    )
    if recipe.fits_weights:
        manifest = msgspec.structs.replace(manifest, weights=fitted_weights(context, manifest))
    distributions = {
        spec.name: exporter.distributions(spec)
        for spec in recipe.members
        if not FORMAT_SPECS[models.format(spec)].reference
    }
    parity = mixture_parity(context, manifest, inputs.mixture_texts, distributions)
    manifest = msgspec.structs.replace(manifest, quantization=parity)
    if recipe.student is not None:
        student = export_student(
            context, recipe.student, manifest, models=models, exporter=exporter, tokenizer=inputs.tokenizer
        )
        manifest = msgspec.structs.replace(manifest, student=student)
    return msgspec.structs.replace(manifest, ngrams=inputs.ngrams)


def _build_within(context: ExportContext, budget: ResourceBudget) -> Manifest:
    """Choose formats within a budget, build the bundle with them, and check that it is within the budget."""
    initial = replace(context, recipe=with_initial_formats(context.recipe))
    inputs = _read_inputs(initial)
    recipe, eight_bits, measure = _choose_formats(initial, inputs, context.recipe, budget)
    manifest = _build(replace(context, recipe=recipe), inputs, eight_bits)
    return msgspec.structs.replace(manifest, budget=measure(manifest))


def _choose_formats(
    context: ExportContext, inputs: _Inputs, recipe: Recipe, budget: ResourceBudget
) -> tuple[Recipe, dict[str, tuple[str, ...]], Callable[[Manifest], BudgetFigures]]:
    """Return the recipe with all formats chosen, each member's linears at 8 bits, and what checks the bundle.

    Args:
        context: With initial formats for the members that have none of their own.
        inputs: The export's.
        recipe: As it was given.
        budget: The limits.
    """
    writer, progress, members = context.writer, context.progress, _Members.of(context, inputs)
    exporter = members.exporter
    fixed = [exporter.entry(spec, exporter.export(spec)) for spec in recipe.members if spec.format is not None]
    candidates = CandidateGraphs(context, models=members.models, graphs=members.graphs, blocks=members.blocks)
    planner = FormatPlanner(context, fixed, inputs.tokenizer, models=members.models, candidates=candidates)
    found = planner.plan(budget)
    measure = partial(
        check_budget,
        budget=budget,
        found=found,
        folder=writer.folder,
        prompt=planner.prompt,
        forced=context.force,
        progress=progress,
    )
    eight_bits = {member.name: member.eight_bits for member in found.members if member.eight_bits}
    return with_planned_formats(context.recipe, found), eight_bits, measure
