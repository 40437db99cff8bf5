"""The labeled examples of a recipe, as far as it reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError
from edgemix.recipe.labeled import Example, read_examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.recipe.labels import LabelRecipe
    from edgemix.runtime.classification.encoding import Text

_EXAMPLES = 512
"""Most examples on which a format is calibrated and judged."""


@dataclass(frozen=True)
class RecipeExamples:
    """The examples of a recipe, by domain.

    Attributes:
        validation: With labels.
        calibration: For formats that observe activations; those of validation where the recipe has no others.
    """

    validation: dict[str, list[Example]]
    calibration: list[Example]

    @classmethod
    def read(cls, recipe: LabelRecipe) -> RecipeExamples:
        """Read the files of a recipe.

        Raises:
            InputError: A file cannot be read.
        """
        data = recipe.data
        validation = {
            domain: read_examples(source, recipe.folder, recipe.task)[: data.max_examples]
            for domain, source in data.validation.items()
        }
        others = [
            read_examples(source, recipe.folder, recipe.task, labeled=False)[: data.max_examples]
            for source in (data.calibration or data.training).values()
        ]
        return cls(validation, _evenly(others or list(validation.values()), _EXAMPLES))

    @property
    def judged(self) -> list[Example]:
        """Examples on which formats are judged: some of every domain."""
        return _evenly(list(self.validation.values()), _EXAMPLES) or self.calibration


def _evenly(parts: list[list[Example]], most: int) -> list[Example]:
    """Return up to `most` examples, as many of each part, spread over it."""
    if not parts:
        return []
    share = max(1, most // len(parts))
    return [example for part in parts for example in part[:: -(-len(part) // share)]]


def texts_of(examples: Sequence[Example]) -> tuple[list[Text], list[Text] | None]:
    """Return the texts of examples, and the second texts where they are pairs.

    Raises:
        InputError: Some are pairs, and others are not.
    """
    texts: list[Text] = [list(text) if isinstance(text, tuple) else text for text, *_ in examples]
    pairs = [example.pair for example in examples]
    if all(pair is None for pair in pairs):
        return texts, None
    if any(pair is None for pair in pairs):
        raise InputError("some examples are pairs of texts, and others are not", "Name pair: for every file.")
    return texts, [pair for pair in pairs if pair is not None]


def targets_of(examples: Sequence[Example], labels: Sequence[str]) -> NDArray[np.int64]:
    """Return the place of each example's label, int64 [examples]; -1 for one that is not among them."""
    places = {label: place for place, label in enumerate(labels)}
    return np.array([places.get(example.labels[0], -1) if example.labels else -1 for example in examples], np.int64)


def label_sets(examples: Sequence[Example], labels: Sequence[str]) -> NDArray[np.bool_]:
    """Return which labels each example has, bool [examples, labels]."""
    return np.array([[label in (example.labels or ()) for label in labels] for example in examples], np.bool_).reshape(
        len(examples), len(labels)
    )
