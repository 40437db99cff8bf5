"""Write the recipe of fine-tuned members: the original one with new adapters, and paths relative to a new folder."""

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
    """Return a recipe for `folder`, where each member's adapter is in a folder of the member's name.

    Args:
        recipe: The original recipe; everything except adapters, paths and weights is kept.
        folder: Folder of the new recipe.
        weights: The mixture's new weights; None keeps the recipe's.
    """

    def moved(path: Path) -> str:
        """Return a path relative to the folder, so that both can be moved together."""
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
    """Return a recipe as YAML, without fields at their defaults."""
    return yaml.safe_dump(
        _without_defaults(msgspec.structs.replace(recipe, folder=Path())), sort_keys=False, allow_unicode=True
    )


def _without_defaults(value: Any) -> Any:
    """Convert structs to plain data, without fields at their defaults."""
    match value:
        case msgspec.Struct():
            fields = {field.name: (getattr(value, field.name), field) for field in msgspec.structs.fields(value)}
            return {name: _without_defaults(each) for name, (each, field) in fields.items() if each != _default(field)}
        case dict():
            return {key: _without_defaults(each) for key, each in value.items()}
        case list() | tuple():
            return [_without_defaults(each) for each in value]
    return value


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
