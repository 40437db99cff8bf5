"""What to build: the recipe, plain frozen data, in Python or from a YAML file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import msgspec
import yaml

from edgemix.errors import InputError, RecipeError, storage_errors
from edgemix.formats import FORMATS, TARGETS, Format, Target
from edgemix.manifest import MEMBER_NAME
from edgemix.text_files import TextSource, read_documents
from edgemix.yaml_reader import Problem, did_you_mean, read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgemix.yaml_reader import Where

MAX_BYTES = 1 << 20
_LONGEST_HUB_ID = 96
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of a recipe's parts."""


class MemberRecipe(_Part, frozen=True):
    """One member: a name, a model (folder, hub id or .gguf file), an optional LoRA adapter, an optional own format."""

    name: str
    model: str
    adapter: str | None = None
    format: Format | None = None


class Data(_Part, frozen=True):
    """The texts, by domain name. They must not overlap: weights are fitted on validation, gates run on calibration
    (on validation where there is none).

    Attributes:
        window: Longest stretch of text that is scored at once, in tokens.
        max_tokens: Most tokens that are read of each text.
    """

    validation: dict[str, TextSource] = {}
    calibration: dict[str, TextSource] = {}
    window: int = 512
    max_tokens: int = 8_000


class Quantization(_Part, frozen=True):
    """How weights are quantised.

    Attributes:
        algorithm: How int4 finds its blocks: `rtn` rounds to nearest, `hqq` fits zero points to the error (Half-
            Quadratic Quantization); other formats have one way.
    """

    algorithm: Literal["rtn", "hqq"] = "rtn"


class Recipe(_Part, frozen=True):
    """Everything `edgemix export` needs. Paths are relative to `folder`, the recipe file's own."""

    members: tuple[MemberRecipe, ...]
    weights: Literal["uniform", "fit"] | dict[str, float] = "uniform"
    format: Format = "int8"
    target: Target = "cpu"
    quantization: Quantization = Quantization()
    data: Data = Data()
    seed: int = 0
    folder: Path = Path()

    def resolve(self, path: str) -> Path:
        """Where a path of the recipe lies."""
        return self.folder / Path(path).expanduser()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: With all mistakes of the file, each with its line and remedy.
    """
    document = read_yaml(_read_text(path), Recipe, _long_form)
    problems = list(document.problems)
    recipe = document.value and msgspec.structs.replace(document.value, folder=path.parent)
    if recipe:
        # What follows from a value that could not be read is no mistake of its own.
        broken = {problem.where for problem in problems}
        problems += [found for found in _problems(recipe) if not any(found.where[: len(at)] == at for at in broken)]
    if problems or recipe is None:
        located = sorted((document.line(problem.where), str(problem)) for problem in problems)
        count = "a mistake" if len(located) == 1 else f"{len(located)} mistakes"
        lines = (f"  {path.name}:{line}: {problem}" for line, problem in located)
        raise RecipeError("\n".join([f"{path} has {count}:", *lines]))
    return recipe


def check(recipe: Recipe) -> list[str]:
    """All mistakes of a recipe that was made in Python, a line each; `load_recipe` has checked its own."""
    try:
        msgspec.convert(msgspec.to_builtins(recipe, enc_hook=str), Recipe, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        return [str(error)]
    return [str(problem) for problem in _problems(recipe)]


def local_path(model: str, folder: Path) -> Path | None:
    """Where a recipe's `model` lies on this machine; None if it is a hub id.

    What exists, relative to `folder`, is a path; of the rest, `name` and `organisation/name` are hub ids.

    Raises:
        InputError: It is neither.
    """
    if path := _existing(model, folder):
        return path
    if model.lower().endswith(".gguf") or len(model) > _LONGEST_HUB_ID or not _HUB_ID.fullmatch(model):
        raise InputError(f"there is no file or folder {model!r}, seen from {folder.resolve()}")
    return None


def template(*models: str) -> str:
    """A recipe with comments, for people to edit; it has no mistakes but files that may be missing.

    Args:
        models: The members' models, each a folder, hub id or .gguf file; without any, an example.
    """
    sources = [_member_lines(f"member{number}", model) for number, model in enumerate(models, start=1)]
    return _TEMPLATE.format(members="".join(sources) or _EXAMPLE_MEMBERS)


def _problems(recipe: Recipe) -> Iterator[Problem]:
    yield from _member_problems(recipe)
    yield from _format_problems(recipe)
    yield from _weight_problems(recipe)
    yield from _text_problems(recipe)
    bounds = {
        ("seed",): (recipe.seed, 0, 2**32 - 1),
        ("data", "window"): (recipe.data.window, 2, 1 << 20),
        ("data", "max_tokens"): (recipe.data.max_tokens, 2, 1 << 40),
    }
    for where, (value, low, high) in bounds.items():
        if not low <= value <= high:
            yield Problem(where, f"is {value}; it may be {low} to {high}")


def _member_problems(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.members:
        yield Problem(("members",), "there are none; give one at least")
    seen: dict[str, int] = {}
    for index, member in enumerate(recipe.members):
        where = ("members", index)
        if not MEMBER_NAME.fullmatch(member.name):
            yield Problem(
                (*where, "name"),
                f"{member.name[:80]!r} cannot name a folder; use up to 64 letters, digits, - _ . with no . or - first "
                "and no . last",
            )
        elif (first := seen.setdefault(member.name.casefold(), index)) != index:
            yield Problem((*where, "name"), f"{member.name!r} is also the name of members[{first}]; choose another")
        yield from _source_problems(recipe, index)


def _source_problems(recipe: Recipe, index: int) -> Iterator[Problem]:
    member = recipe.members[index]
    try:
        path = local_path(member.model, recipe.folder)
    except InputError as error:
        yield Problem(("members", index, "model"), error.message)
    else:
        gguf = path is not None and path.is_file() and path.suffix.lower() == ".gguf"
        if path is not None and not gguf and not (path / "config.json").is_file():
            yield Problem(
                ("members", index, "model"),
                f"{member.model!r} is neither a folder with a config.json nor a .gguf file; save a model with "
                "save_pretrained()",
            )
    if member.adapter is not None:
        path = _existing(member.adapter, recipe.folder)
        if path is None or not (path / "adapter_config.json").is_file():
            yield Problem(
                ("members", index, "adapter"),
                f"there is no folder {member.adapter!r} with an adapter_config.json, seen from "
                f"{recipe.folder.resolve()}; edgemix finetune makes one",
            )


def _existing(path: str, folder: Path) -> Path | None:
    try:
        found = folder / Path(path).expanduser()
        return found if found.exists() else None
    except (OSError, RuntimeError):  # a name too long, an unknown ~user
        return None


def _format_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.target == "cuda":
        formats: list[tuple[Where, Format | None]] = [(("format",), recipe.format)]
        formats += [(("members", i, "format"), m.format) for i, m in enumerate(recipe.members)]
        for where, form in formats:
            if form == "int8-dynamic":
                yield Problem(where, "int8-dynamic runs on the CPU only; with target: cuda choose int8")


def _weight_problems(recipe: Recipe) -> Iterator[Problem]:
    weights = recipe.weights
    if weights == "fit" and not recipe.data.validation:
        yield Problem(("weights",), "fit needs text that no member was trained on; name it under data: validation:")
    if not isinstance(weights, dict):
        return
    names = [member.name for member in recipe.members]
    if all(names):  # a name that could not be read may be any of those that seem unknown
        for name in weights.keys() - set(names):
            yield Problem(("weights", name), f"no member has this name; {did_you_mean(name, names)}")
        if missing := [name for name in names if name not in weights]:
            yield Problem(("weights",), f"has no weight for {', '.join(missing)}; 0 leaves a member out")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            yield Problem(("weights", name), f"is {weight}; it must be a number of 0 or more")
    if weights and not any(weights.values()):
        yield Problem(("weights",), "are all zero; give one member a weight above 0")


def _text_problems(recipe: Recipe) -> Iterator[Problem]:
    places: dict[Path, str] = {}
    for part, sources in (("validation", recipe.data.validation), ("calibration", recipe.data.calibration)):
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
                yield Problem(where, f"is the same file as {other}; no text may serve twice")


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
    """The full form of a text source given as a path, and of texts given as a list: their domains are the files'
    names without suffix.
    """
    if kind is TextSource and isinstance(node, yaml.ScalarNode) and node.value:
        return _mapping(node, {"file": node})
    if get_origin(kind) is dict and get_args(kind)[1] is TextSource and isinstance(node, yaml.SequenceNode):
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


def _member_lines(name: str, model: str) -> str:
    return f"  - name: {name}\n    model: {json.dumps(model, ensure_ascii=False)}\n"


_EXAMPLE_MEMBERS = """\
  - name: general
    model: HuggingFaceTB/SmolLM2-135M # a Hugging Face folder, a hub id, or a .gguf file
  - name: math
    model: HuggingFaceTB/SmolLM2-135M
    adapter: adapters/math # a LoRA adapter; edgemix finetune makes one
    # format: int4           # this member's own format
"""

_TEMPLATE = f"""\
# What edgemix export builds. Paths are relative to this file.

# The models to mix. They must share one tokenizer.
members:
{{members}}
# uniform, fit (to data: validation:), or a number for each member:
#   weights: {{{{general: 0.7, math: 0.3}}}}
weights: uniform

# {", ".join(FORMATS)}
format: int8

# {", ".join(TARGETS)}
target: cpu

# How int4 rounds: rtn (to nearest) or hqq (Half-Quadratic Quantization).
# quantization:
#   algorithm: rtn

# Text that no member was trained on, one file for each domain: .txt, or .jsonl with a template for its lines.
# Weights are fitted on validation; the check after quantisation reads calibration, or validation without it.
# data:
#   validation:
#     prose: data/prose.txt
#     math:
#       file: data/math.jsonl
#       template: "Question: {{{{question}}}}\\nAnswer: {{{{answer}}}}\\n"
#   window: 512       # longest stretch that is scored at once, in tokens
#   max_tokens: 8000  # most tokens that are read of each text

seed: 0
"""
