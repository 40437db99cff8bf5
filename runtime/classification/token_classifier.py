"""`TokenClassifier`: a mixture whose y is a label for each word of a text."""

from __future__ import annotations

from typing import ClassVar

from edgemix.runtime.classification.loaded import LabelMixture
from edgemix.tasks import LabelTaskName  # noqa: TC001


class TokenClassifier(LabelMixture):
    """A loaded mixture of taggers."""

    task: ClassVar[LabelTaskName] = "token-classification"
