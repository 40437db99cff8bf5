"""Read a recipe from a YAML file, and check one that was made in Python."""

from __future__ import annotations

from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import msgspec
import yaml

from edgemix.errors import RecipeError, storage_errors
from edgemix.recipe.bounds import bound_problems
from edgemix.recipe.label_validation import label_problems_of
from edgemix.recipe.labeled import LabeledSource
from edgemix.recipe.problems import did_you_mean
from edgemix.recipe.schema import Recipe
from edgemix.recipe.text_sources import TextSource
from edgemix.recipe.validation import problems_of
from edgemix.recipe.yaml_loader import read_yaml, top_level_value
from edgemix.tasks import DEFAULT_TASK, TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemix.recipe.labels import LabelRecipe
    from edgemix.tasks import TaskName

MAX_BYTES = 1 << 20
_SOURCES = (TextSource, LabeledSource)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe of text generation from a YAML file.

    Raises:
        RecipeError: With all mistakes of the file, each with its line and remedy; or it is of another task.
    """
    recipe = load_any_recipe(path)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path}: is a recipe of {recipe.task}, and this needs one of {DEFAULT_TASK}")
    return recipe


def load_any_recipe(path: Path) -> Recipe | LabelRecipe:
    """Read a recipe of any task from a YAML file.

    Raises:
        RecipeError: With all mistakes of the file, each with its line and remedy.
    """
    text = _read_text(path)
    task = _task_of(text, path)
    # The record of another task than the default one has the key itself.
    text_kind: type[Recipe | LabelRecipe] = TASKS[task].load("recipe")
    document = read_yaml(text, text_kind, _long_form, ignored=() if task != DEFAULT_TASK else ("task",))
    problems = list(document.problems)
    recipe = document.value and msgspec.structs.replace(document.value, folder=path.parent)
    if recipe:
        # Consequences of a value that could not be read are not reported.
        broken = {problem.where for problem in problems}
        found_problems = problems_of(recipe) if isinstance(recipe, Recipe) else label_problems_of(recipe)
        problems += [found for found in found_problems if not any(found.where[: len(at)] == at for at in broken)]
    if problems or recipe is None:
        located = sorted((document.line(problem.where), str(problem)) for problem in problems)
        count = "a mistake" if len(located) == 1 else f"{len(located)} mistakes"
        lines = (f"  {path.name}:{line}: {problem}" for line, problem in located)
        raise RecipeError("\n".join([f"{path} has {count}:", *lines]))
    return recipe


def _task_of(text: str, path: Path) -> TaskName:
    """Return the task that a recipe names, before it is read as a recipe of that task."""
    task = top_level_value(text, "task")
    if task is None:
        return DEFAULT_TASK
    if task not in TASKS:
        raise RecipeError(f"{path} has a mistake:\n  {path.name}: task: is {task[:80]!r}; {did_you_mean(task, TASKS)}")
    return TASKS[task].name


def check(recipe: Recipe | LabelRecipe) -> list[str]:
    """Return all mistakes of a recipe that was made in Python, one per line; `load_recipe` checks its own."""
    plain = msgspec.to_builtins(recipe, enc_hook=str)
    for *part, field in (problem.where for problem in bound_problems(recipe)):
        reduce(getitem, part, plain).pop(field)  # msgspec would report the first of them only
    try:
        msgspec.convert(plain, type(recipe), dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        return [str(error)]
    found = problems_of(recipe) if isinstance(recipe, Recipe) else label_problems_of(recipe)
    return [str(problem) for problem in found]


def _read_text(path: Path) -> str:
    with storage_errors(f"reading {path}"):
        if not path.exists():
            raise RecipeError(f"{path}: there is no such recipe", "edgemix init writes one to start from.")
        if not path.is_file():
            raise RecipeError(f"{path}: is no file; a recipe is a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: has more than {MAX_BYTES:,} bytes; a recipe is a small YAML file")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def _long_form(kind: Any, node: yaml.Node) -> yaml.Node:
    """Return the full form of a source given as a path, and of sources given as a list, whose domains are the files'
    names without suffix.
    """
    if kind in _SOURCES and isinstance(node, yaml.ScalarNode) and node.value:
        return _mapping(node, {"file": node})
    if get_origin(kind) is dict and get_args(kind)[1] in _SOURCES and isinstance(node, yaml.SequenceNode):
        pairs = [(_scalar(child, _domain(child, index)), child) for index, child in enumerate(node.value)]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs, node.start_mark, node.end_mark)
    return node


def _domain(node: yaml.Node, index: int) -> str:
    if isinstance(node, yaml.MappingNode):
        files = (value for key, value in node.value if key.value == "file" and isinstance(value, yaml.ScalarNode))
        node = next(files, node)
    return (Path(node.value).stem if isinstance(node, yaml.ScalarNode) else "") or str(index)


def _mapping(node: yaml.Node, entries: Mapping[str, yaml.Node]) -> yaml.MappingNode:
    pairs = [(_scalar(node, key), value) for key, value in entries.items()]
    return yaml.MappingNode("tag:yaml.org,2002:map", pairs, node.start_mark, node.end_mark)


def _scalar(node: yaml.Node, text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, node.start_mark, node.end_mark)
