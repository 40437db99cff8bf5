"""The recipe of fine-tuned members: the one that they come from, with their new adapters, seen from another folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from edgemix.recipe.validation import local_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemix.recipe.schema import MemberRecipe, Recipe
    from edgemix.recipe.text_sources import TextSource

RECIPE = "recipe.yaml"


def finetuned_recipe(recipe: Recipe, folder: Path, weights: Mapping[str, float] | None = None) -> Recipe:
    """A recipe that lies in `folder` beside its members' adapters, each in a folder of the member's name.

    Args:
        recipe: The one that the members come from; everything but adapters, paths and weights stays.
        folder: Where the new one will lie.
        weights: The mixture's new weights; None keeps what the recipe says of them.
    """

    def moved(path: Path) -> str:
        """Where a path lies as seen from the folder, so that both can be moved together."""
        return os.path.relpath(path.resolve(), folder.resolve())

    def member(spec: MemberRecipe) -> MemberRecipe:
        path = local_path(spec.model, recipe.folder)
        return msgspec.structs.replace(spec, model=moved(path) if path else spec.model, adapter=spec.name)

    def texts(sources: Mapping[str, TextSource]) -> dict[str, TextSource]:
        return {
            domain: msgspec.structs.replace(source, file=moved(recipe.resolve(source.file)))
            for domain, source in sources.items()
        }

    data, student = recipe.data, recipe.student
    if student is not None and student.config is not None:
        student = msgspec.structs.replace(student, config=moved(recipe.resolve(student.config)))
    return msgspec.structs.replace(
        recipe,
        members=tuple(member(spec) for spec in recipe.members),
        weights=recipe.weights if weights is None else dict(weights),
        student=student,
        data=msgspec.structs.replace(
            data,
            validation=texts(data.validation),
            calibration=texts(data.calibration),
            training=texts(data.training),
        ),
        folder=folder,
    )


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML, without what is as it would be anyway."""
    return yaml.safe_dump(_given(msgspec.structs.replace(recipe, folder=Path())), sort_keys=False, allow_unicode=True)


def _given(value: Any) -> Any:
    """Plain data of structs, without fields at their defaults."""
    match value:
        case msgspec.Struct():
            fields = {field.name: (getattr(value, field.name), field) for field in msgspec.structs.fields(value)}
            return {name: _given(each) for name, (each, field) in fields.items() if each != _default(field)}
        case dict():
            return {key: _given(each) for key, each in value.items()}
        case list() | tuple():
            return [_given(each) for each in value]
    return value


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
