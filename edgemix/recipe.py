"""What to build: the recipe, plain frozen data from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edgemix.formats import Format, Target


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of a recipe's parts."""


class MemberRecipe(_Part):
    """One member: a name, a model (folder, hub id or .gguf file), an optional LoRA adapter, an optional own format."""

    name: str
    model: str
    adapter: str | None = None
    format: Format | None = None


class TextSource(_Part):
    """A UTF-8 text file, or a .jsonl file whose every line is a document: its `text` field, or `template` filled in
    with the line's fields (`"Question: {question}\\nAnswer: {answer}\\n"`)."""

    file: str
    template: str | None = None


class Data(_Part):
    """The texts, by domain name. They must not overlap: weights are fitted on validation, gates run on calibration
    (on validation where there is none)."""

    validation: dict[str, TextSource] = {}
    calibration: dict[str, TextSource] = {}
    window: int = 512
    max_tokens: int = 20_000


class Recipe(_Part):
    """Everything `edgemix export` needs. Paths are relative to `folder`, the recipe file's own."""

    members: tuple[MemberRecipe, ...]
    weights: Literal["uniform", "fit"] | dict[str, float] = "uniform"
    format: Format = "int8"
    target: Target = "cpu"
    data: Data = Data()
    seed: int = 0
    folder: Path = Path()
