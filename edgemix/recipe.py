"""What to build: the recipe, plain frozen data, in Python or from a YAML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import msgspec
import yaml

from edgemix.compression import Pruning, Quantization, Student
from edgemix.errors import RecipeError, storage_errors
from edgemix.formats import FORMATS, TARGETS, Format, Target
from edgemix.recipe_checks import problems_of
from edgemix.text_files import TextSource
from edgemix.yaml_reader import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 1 << 20


_NGRAMS = 1 << 18

CacheType = Literal["float", "int8"]
"""How key-value state is kept."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of a recipe's parts."""


class MemberRecipe(_Part, frozen=True):
    """One member: a name, a model (folder, hub id or .gguf file), an optional LoRA adapter, and what is its own of the
    format, the quantisation and the pruning.
    """

    name: str
    model: str
    adapter: str | None = None
    format: Format | None = None
    quantization: Quantization | None = None
    prune: Pruning | None = None


class Data(_Part, frozen=True):
    """The texts, by domain name. They must not overlap: weights are fitted on validation; quantisation and pruning look
    at calibration (at training text where there is none), and gates measure on it; the student learns from training, of
    which n-grams are counted, too.

    Attributes:
        window: Longest stretch of text that is scored at once, in tokens.
        max_tokens: Most tokens that are read of each text.
    """

    validation: dict[str, TextSource] = {}
    calibration: dict[str, TextSource] = {}
    training: dict[str, TextSource] = {}
    window: int = 512
    max_tokens: int = 8_000


class Recipe(_Part, frozen=True):
    """Everything `edgemix export` needs. Paths are relative to `folder`, the recipe file's own.

    Attributes:
        ngrams: Most n-grams of the training text that the bundle keeps to draft from.
    """

    members: tuple[MemberRecipe, ...]
    weights: Literal["uniform", "fit"] | dict[str, float] = "uniform"
    format: Format = "int8"
    target: Target = "cpu"
    quantization: Quantization = Quantization()
    stack: bool | str = False
    cache: CacheType = "float"
    student: Student | None = None
    ngrams: int = _NGRAMS
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
        problems += [found for found in problems_of(recipe) if not any(found.where[: len(at)] == at for at in broken)]
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
    return [str(problem) for problem in problems_of(recipe)]


def template(*models: str) -> str:
    """A recipe with comments, for people to edit; it has no mistakes but files that may be missing.

    Args:
        models: The members' models, each a folder, hub id or .gguf file; without any, an example.
    """
    sources = [_member_lines(f"member{number}", model) for number, model in enumerate(models, start=1)]
    return _TEMPLATE.format(members="".join(sources) or _EXAMPLE_MEMBERS)


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
    # prune: {ffn: 0.25}     # share of its feed-forward channels that goes; also layers, heads, sparsity
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

# How int4 finds its weights. auto is distil (trained on the text under data: calibration; minutes) where there is such
# text, else rtn (rounding to nearest); gptq looks at that text, too, but does not train; hqq is Half-Quadratic
# Quantization.
# quantization:
#   algorithm: auto
#   group: 32        # weights that share a scale
#   steps: 160       # of training, 2,048 tokens each
#   eight_bits: 0.1  # share of the weights that gets 8 bits: the layers that suffer most from 4
#   scale: true      # move scales from weights to what they read first (AWQ)
#   rotate: true     # turn the residual stream first (QuaRot); of int8-dynamic, too

# Members that are one model and an adapter each, or not even that, in one graph: the model is stored and read once for
# all of them, and of a quantised GGUF file it stays as it is, bit for bit. With the model's name in the place of true,
# full fine-tunes of it become such members, too, where a few ranks of what differs are enough.
# stack: true

# float, or int8: a text takes a quarter of the memory, with scales found on the text under data: calibration.
# cache: int8

# A small model that is distilled from the mixture on the text under data: training, for where memory or power is short.
# It is cut from the members to a third of one's decoding time.
# student:
#   format: int4
#   minutes: 30

# How many n-grams of the text under data: training the bundle keeps, to draft from while it writes: what follows pieces
# of up to four tokens that come three times at least, 13 bytes each. 0 if nobody should see pieces of that text.
# ngrams: {_NGRAMS}

# Texts, one file for each domain: .txt, or .jsonl with a template for its lines. Weights are fitted on validation,
# which no member was trained on. Quantisation looks at calibration, which may be training text; the check after it
# reads that, or validation without it. The student learns from training, and its n-grams are counted.
# data:
#   validation:
#     prose: data/prose.txt
#     math:
#       file: data/math.jsonl
#       template: "Question: {{{{question}}}}\\nAnswer: {{{{answer}}}}\\n"
#   calibration:
#     math: {{{{file: data/math-train.jsonl, template: "{{{{question}}}} {{{{answer}}}}"}}}}
#   training:
#     prose: data/prose-train.txt
#   window: 512       # longest stretch that is scored at once, in tokens
#   max_tokens: 8000  # most tokens that are read of each text

seed: 0
"""
