"""The recipe: frozen data that describes a bundle, in Python or from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgemix.formats import Format, Target
from edgemix.recipe.bounds import Seed
from edgemix.recipe.compression import Pruning, Quantization, Student
from edgemix.recipe.text_sources import TextSource

NGRAMS = 1 << 18

CacheType = Literal["float", "int8"]
"""How the key-value cache is stored."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of a recipe's parts."""


class MemberRecipe(_Part, frozen=True):
    """One member: a name, a model (folder, hub id or .gguf file), an optional LoRA adapter, and optionally its own
    format, quantization and pruning.
    """

    name: str
    model: str
    adapter: str | None = None
    format: Format | None = None
    quantization: Quantization | None = None
    prune: Pruning | None = None


class Data(_Part, frozen=True):
    """The texts, by domain name, which must not overlap. Weights are fitted on validation. Quantization, pruning and
    the parity gates use calibration, or training where there is none. The student and the n-grams come from training.

    Attributes:
        window: Maximum tokens that are scored at once.
        max_tokens: Maximum tokens of each text.
    """

    validation: dict[str, TextSource] = {}
    calibration: dict[str, TextSource] = {}
    training: dict[str, TextSource] = {}
    window: Annotated[int, Meta(ge=2, le=1 << 20)] = 512
    max_tokens: Annotated[int, Meta(ge=2, le=1 << 40)] = 8_000


class Recipe(_Part, frozen=True):
    """Everything `edgemix export` needs. Paths are relative to `folder`, the recipe file's own.

    Attributes:
        weights: "uniform", a number for each member, or fitted on the validation text: "adaptive" follows the text that
            is generated, beginning with the fitted weights, "fixed" stays with them, and "fit" is adaptive where there
            are several domains and fixed where there is one.
        context: Most tokens of a sequence; by default the members' own, as far as tables of positions stay small.
        ngrams: Maximum n-grams of the training text that the bundle keeps to draft from.
    """

    members: tuple[MemberRecipe, ...]
    weights: Literal["uniform", "fit", "adaptive", "fixed"] | dict[str, float] = "uniform"
    format: Format = "int8"
    target: Target = "cpu"
    quantization: Quantization = Quantization()
    stack: bool | str = False
    cache: CacheType = "float"
    context: Annotated[int, Meta(ge=16, le=1 << 24)] | None = None
    student: Student | None = None
    ngrams: Annotated[int, Meta(ge=0, le=1 << 24)] = NGRAMS
    data: Data = Data()
    seed: Seed = 0
    folder: Path = Path()

    @property
    def fits_weights(self) -> bool:
        """Whether weights are fitted on the validation text."""
        return self.weights in ("fit", "adaptive", "fixed")

    def resolve(self, path: str) -> Path:
        """Return a path of the recipe, relative to its folder."""
        return self.folder / Path(path).expanduser()
