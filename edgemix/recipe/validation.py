"""Checks of a recipe beyond its structure: each mistake with its place and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgemix.bundle.manifest import MEMBER_NAME, RESERVED_NAMES
from edgemix.errors import InputError
from edgemix.formats import FORMAT_SPECS
from edgemix.numbers import is_finite, shown
from edgemix.recipe.bounds import bound_problems
from edgemix.recipe.compression import pruning_problems, quantization_problems, student_problems
from edgemix.recipe.problems import Problem, did_you_mean
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemix.formats import Format
    from edgemix.recipe.compression import Quantization
    from edgemix.recipe.problems import Where
    from edgemix.recipe.schema import Recipe

_LONGEST_HUB_ID = 96
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")


def problems_of(recipe: Recipe) -> Iterator[Problem]:
    """Yield all mistakes of a recipe that could be read."""
    yield from _member_problems(recipe)
    yield from _format_problems(recipe)
    yield from _cache_problems(recipe)
    yield from _weight_problems(recipe)
    yield from _text_problems(recipe)
    yield from _compression_problems(recipe)
    yield from bound_problems(recipe)


def _member_problems(recipe: Recipe) -> Iterator[Problem]:
    yield from name_problems([member.name for member in recipe.members])
    for index, member in enumerate(recipe.members):
        yield from model_problems(member.model, member.adapter, recipe.folder, ("members", index))


def name_problems(names: Sequence[str]) -> Iterator[Problem]:
    """Yield the mistakes in members' names."""
    if not names:
        yield Problem(("members",), "there are none; give one at least")
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        where = ("members", index, "name")
        if not MEMBER_NAME.fullmatch(name):
            yield Problem(
                where,
                f"{name[:80]!r} cannot name a folder; use up to 64 letters, digits, - _ . with no . or - first "
                "and no . last",
            )
        elif name.casefold() in RESERVED_NAMES:
            yield Problem(where, f"{name!r} is the name of a mixture or the student; choose another")
        elif (first := seen.setdefault(name.casefold(), index)) != index:
            yield Problem(where, f"{name!r} is also the name of members[{first}]; choose another")


def model_problems(
    model: str, adapter: str | None, folder: Path, where: Where, *, gguf: bool = True
) -> Iterator[Problem]:
    """Yield what is wrong with the paths of a model and its adapter.

    Args:
        model: The model, as a recipe names it.
        adapter: Its adapter.
        folder: The recipe's folder.
        where: The member's place in the recipe.
        gguf: Whether a model may be a GGUF file.
    """
    try:
        path = local_path(model, folder)
    except InputError as error:
        yield Problem((*where, "model"), error.message)
    else:
        is_gguf = gguf and path is not None and path.is_file() and path.suffix.lower() == ".gguf"
        if path is not None and not is_gguf and not _has_config(path):
            file = " nor a .gguf file" if gguf else ""
            yield Problem(
                (*where, "model"),
                f"{model!r} is {'neither' if gguf else 'not'} a folder with a config.json{file}; save a model with "
                "save_pretrained()",
            )
    if adapter is not None:
        path = existing_path(adapter, folder)
        if path is None or not (path / "adapter_config.json").is_file():
            yield Problem(
                (*where, "adapter"),
                f"there is no folder {adapter!r} with an adapter_config.json, seen from "
                f"{folder.resolve()}; edgemix finetune makes one",
            )


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def existing_path(path: str, folder: Path) -> Path | None:
    """Return a recipe's path seen from its folder; None where there is nothing."""
    try:
        found = folder / Path(path).expanduser()
        return found if found.exists() else None
    except (OSError, RuntimeError):  # a name too long, an unknown ~user
        return None


def _format_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.target == "cuda":
        formats: list[tuple[Where, Format | None]] = [(("format",), recipe.format)]
        formats += [(("members", i, "format"), m.format) for i, m in enumerate(recipe.members)]
        if recipe.student is not None:
            formats.append((("student", "format"), recipe.student.format))
        for where, name in formats:
            if name is not None and recipe.target not in FORMAT_SPECS[name].targets:
                yield Problem(where, f"{name} runs on the CPU only; with target: cuda choose int8")


def _cache_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.cache != "int8":
        return
    if recipe.stack:
        yield Problem(("cache",), "int8 does not go with stack: a graph of several members keeps their cache in float")
    formats = [member.format or recipe.format for member in recipe.members]
    if recipe.student is not None:
        formats.append(recipe.student.format)
    if any(FORMAT_SPECS[name].floating_point for name in formats):
        yield Problem(("cache",), "int8 goes with quantized formats: it is less precise than fp32 and fp16")


def _weight_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.fits_weights and not recipe.data.validation:
        needed = "needs text that no member was trained on; name it under data: validation:"
        yield Problem(("weights",), f"{recipe.weights} {needed}")
    if isinstance(recipe.weights, dict):
        yield from given_weight_problems(recipe.weights, [member.name for member in recipe.members])


def given_weight_problems(weights: dict[str, float], names: Sequence[str]) -> Iterator[Problem]:
    """Yield the mistakes in weights that are given by number."""
    if all(names):  # an unreadable name may be one of those that seem unknown
        for name in weights.keys() - set(names):
            yield Problem(("weights", name), f"no member has this name; {did_you_mean(name, names)}")
        if missing := [name for name in names if name not in weights]:
            yield Problem(("weights",), f"has no weight for {', '.join(missing)}; 0 leaves a member out")
    for name, weight in weights.items():
        if not (is_finite(weight) and weight >= 0):
            yield Problem(("weights", name), f"is {shown(weight)}; it must be a number of 0 or more")
    if weights and not any(weights.values()):
        yield Problem(("weights",), "are all zero; give one member a weight above 0")


def _text_problems(recipe: Recipe) -> Iterator[Problem]:
    places: dict[Path, str] = {}
    for part in ("validation", "calibration", "training"):
        sources = getattr(recipe.data, part)
        for domain, source in sources.items():
            where = ("data", part, domain)
            if not source.file:
                continue
            try:
                read_documents(source, recipe.folder)
            except InputError as error:
                yield Problem(where, "; ".join(filter(None, (error.message, error.remedy))))
                continue
            path = recipe.resolve(source.file).resolve()
            if (other := places.setdefault(path, f"data.{part}.{domain}")) != f"data.{part}.{domain}":
                yield Problem(where, f"is the same file as {other}; no text may be used twice")


def _compression_problems(recipe: Recipe) -> Iterator[Problem]:
    quantizations: list[tuple[Where, Quantization]] = [(("quantization",), recipe.quantization)]
    for index, member in enumerate(recipe.members):
        if member.quantization is not None:
            quantizations.append((("members", index, "quantization"), member.quantization))
        if member.prune is not None:
            yield from pruning_problems(member.prune, ("members", index, "prune"))
            if not (recipe.data.calibration or recipe.data.training):
                yield Problem(("members", index, "prune"), "needs text; name some under data: calibration:")
    for where, quantization in quantizations:
        yield from quantization_problems(quantization, where)
        if quantization.reads_text and not (recipe.data.calibration or recipe.data.training):
            word = next(word for word in ("scale", "eight_bits", "algorithm") if getattr(quantization, word))
            yield Problem((*where, word), "needs text; name some under data: calibration:")
    if recipe.student is not None:
        yield from student_problems(recipe.student, [member.name for member in recipe.members], ("student",))
        if not recipe.data.training:
            yield Problem(("student",), "needs text; name some under data: training:")
        config = recipe.student.config
        if config is not None and ((path := existing_path(config, recipe.folder)) is None or not _has_config(path)):
            yield Problem(
                ("student", "config"),
                f"there is no folder {config!r} with a config.json, seen from {recipe.folder.resolve()}",
            )


def local_path(model: str, folder: Path) -> Path | None:
    """Return the path of a recipe's `model` on this machine; None if it is a hub id.

    An existing path, relative to `folder`, comes first; otherwise `name` and `organization/name` are hub ids.

    Raises:
        InputError: It is neither.
    """
    if path := existing_path(model, folder):
        return path
    if model.lower().endswith(".gguf") or len(model) > _LONGEST_HUB_ID or not _HUB_ID.fullmatch(model):
        raise InputError(f"there is no file or folder {model!r}, seen from {folder.resolve()}")
    return None
