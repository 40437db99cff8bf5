"""The recipe of a mixture over labels: classifiers, taggers and rules that share the names of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgemix.formats import Format, Target
from edgemix.recipe.bounds import Seed
from edgemix.recipe.compression import Quantization
from edgemix.recipe.labeled import LabeledSource
from edgemix.tasks import LabelCombine, LabelTaskName


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of a recipe's parts."""


class LabelMemberRecipe(_Part, frozen=True):
    """One member: a name, and a model (folder or hub id) with its head, or a file of rules.

    Attributes:
        adapter: A LoRA adapter on the model.
        labels: The model's name of a label -> the mixture's name. Labels that are left out keep their names.
        format: Its weight format, if it is not the recipe's.
    """

    name: str
    model: str | None = None
    rules: str | None = None
    adapter: str | None = None
    labels: dict[str, str] = {}
    format: Format | None = None


class LabelData(_Part, frozen=True):
    """The examples, by domain name. Temperatures and weights are fitted on validation, formats are calibrated on
    calibration, or validation where there is none, and judged on validation.

    Attributes:
        max_examples: Most examples of each file that are read, from its beginning.
    """

    validation: dict[str, LabeledSource] = {}
    calibration: dict[str, LabeledSource] = {}
    training: dict[str, LabeledSource] = {}
    max_examples: Annotated[int, Meta(ge=1, le=1 << 40)] = 10_000


class LabelRecipe(_Part, frozen=True):
    """Everything `edgemix export` needs for a mixture over labels. Paths are relative to `folder`.

    Attributes:
        labels: The mixture's labels in order; by default those of the members, in the order of their first use.
        multi_label: Whether an example may have several labels, or none; each is then a yes or no of its own.
        weights: "uniform", a number for each member, or fitted on the validation examples.
        combine: How the members' distributions are mixed by default.
        calibrate: Whether a temperature is fitted to each member on the validation examples.
        max_length: Most tokens of a text; by default the members' own limits, and at most 512.
    """

    task: LabelTaskName
    members: tuple[LabelMemberRecipe, ...]
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    weights: Literal["uniform", "fit"] | dict[str, float] = "uniform"
    combine: LabelCombine = "linear"
    calibrate: bool = True
    format: Format = "int8-dynamic"
    target: Target = "cpu"
    quantization: Quantization = Quantization()
    max_length: Annotated[int, Meta(ge=4, le=1 << 20)] | None = None
    data: LabelData = LabelData()
    seed: Seed = 0
    folder: Path = Path()

    @property
    def fits_weights(self) -> bool:
        """Whether weights are fitted on the validation examples."""
        return self.weights == "fit"

    def resolve(self, path: str) -> Path:
        """Return a path of the recipe, relative to its folder."""
        return self.folder / Path(path).expanduser()
