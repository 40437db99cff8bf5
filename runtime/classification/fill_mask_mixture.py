"""`FillMask`: a mixture whose y is a token in the place of a mask."""

from __future__ import annotations

from typing import ClassVar

from edgemix.runtime.classification.loaded import LabelMixture
from edgemix.tasks import LabelTaskName  # noqa: TC001


class FillMask(LabelMixture):
    """A loaded mixture of masked language models."""

    task: ClassVar[LabelTaskName] = "fill-mask"
