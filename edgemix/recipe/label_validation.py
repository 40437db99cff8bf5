"""Checks of a recipe over labels beyond its structure: each mistake with its place and remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.bundle.label_bundle.validation import LONGEST_LABEL
from edgemix.errors import InputError
from edgemix.formats import FORMAT_SPECS
from edgemix.recipe.bounds import bound_problems
from edgemix.recipe.compression import quantization_problems
from edgemix.recipe.labeled import read_examples
from edgemix.recipe.problems import Problem
from edgemix.recipe.validation import existing_path, given_weight_problems, model_problems, name_problems

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgemix.recipe.labels import LabelMemberRecipe, LabelRecipe
    from edgemix.recipe.problems import Where


def label_problems_of(recipe: LabelRecipe) -> Iterator[Problem]:
    """Yield all mistakes of a recipe that could be read."""
    yield from name_problems([member.name for member in recipe.members])
    for index, member in enumerate(recipe.members):
        yield from _member_problems(member, recipe, ("members", index))
    yield from _label_problems(recipe)
    yield from _weight_problems(recipe)
    yield from _example_problems(recipe)
    yield from quantization_problems(recipe.quantization, ("quantization",))
    yield from bound_problems(recipe)


def _member_problems(member: LabelMemberRecipe, recipe: LabelRecipe, where: Where) -> Iterator[Problem]:
    if (member.model is None) == (member.rules is None):
        yield Problem(where, "needs either a model or rules")
    elif member.model is not None:
        yield from model_problems(member.model, member.adapter, recipe.folder, where, gguf=False)
    elif member.rules is not None:
        if recipe.task == "fill-mask":
            yield Problem((*where, "rules"), "fill-mask has no rules; its members are models")
        if (path := existing_path(member.rules, recipe.folder)) is None or not path.is_file():
            yield Problem((*where, "rules"), f"there is no file {member.rules!r}, seen from {recipe.folder.resolve()}")
        if member.adapter or member.format:
            yield Problem(where, "rules have neither an adapter nor a format")
    if len(set(member.labels.values())) < len(member.labels):
        yield Problem((*where, "labels"), "two of its labels have the same new name")
    name = member.format or recipe.format
    if member.model is not None and recipe.target not in FORMAT_SPECS[name].targets:
        yield Problem((*where, "format"), f"{name} runs on the CPU only; with target: cuda choose int8")


def _label_problems(recipe: LabelRecipe) -> Iterator[Problem]:
    if len(set(recipe.labels)) < len(recipe.labels):
        yield Problem(("labels",), "a label is there twice")
    if recipe.labels and recipe.task == "fill-mask":
        yield Problem(("labels",), "fill-mask predicts tokens; leave the labels out")
    if len(recipe.labels) == 1 and not recipe.multi_label:
        yield Problem(("labels",), "there is one label; at least two are needed to choose from")
    for label in recipe.labels:
        if not label or len(label) > LONGEST_LABEL:
            yield Problem(("labels",), f"a label has 1 to {LONGEST_LABEL} characters, not {len(label)}")
    if recipe.multi_label and recipe.task != "text-classification":
        yield Problem(("multi_label",), "only text-classification has examples with several labels")


def _weight_problems(recipe: LabelRecipe) -> Iterator[Problem]:
    if recipe.fits_weights and not recipe.data.validation:
        needed = "needs examples that no member was trained on; name them under data: validation:"
        yield Problem(("weights",), f"fit {needed}")
    if isinstance(recipe.weights, dict):
        yield from given_weight_problems(recipe.weights, [member.name for member in recipe.members])


def _example_problems(recipe: LabelRecipe) -> Iterator[Problem]:
    places: dict[Path, str] = {}
    for part in ("validation", "calibration", "training"):
        for domain, source in getattr(recipe.data, part).items():
            where = ("data", part, domain)
            if not source.file:
                continue
            try:
                read_examples(source, recipe.folder, recipe.task, labeled=part == "validation")
            except InputError as error:
                yield Problem(where, "; ".join(filter(None, (error.message, error.remedy))))
                continue
            path = recipe.resolve(source.file).resolve()
            if (other := places.setdefault(path, f"data.{part}.{domain}")) != f"data.{part}.{domain}":
                yield Problem(where, f"is the same file as {other}; no examples may be used twice")
