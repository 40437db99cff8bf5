"""Corrections: weights that follow what users say, from a Dirichlet prior that the bundle keeps.

The bundle holds how often each member was drawn for the examples that its weights were fitted to (`fitting`). New
examples add their draws to these counts, without the old examples. Where the new ones are like the old, that is near a
fit to all of them; where they are not, the old draws hold the weights back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgemix.errors import InputError
from edgemix.runtime.classification.fitting import fit_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.bundle.label_bundle.manifest import LabelManifest

_ASSUMED = 20.0
"""Examples that weights count as which were not fitted to any."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What corrections changed.

    Attributes:
        before: Member name -> weight before.
        after: The same afterwards.
        examples: Number of corrections that a member could explain.
        right: Share of them that the mixture had predicted right before; `right_after` with the new weights.
    """

    before: dict[str, float]
    after: dict[str, float]
    examples: int
    right: float
    right_after: float


def refit(manifest: LabelManifest, log_probabilities: NDArray[np.float64], present: NDArray[np.bool_]) -> LabelManifest:
    """Return the manifest with weights that take further examples into account.

    Args:
        manifest: The bundle's.
        log_probabilities: Each member's of the right labels [members, examples].
        present: Where each member has an opinion [members, examples].

    Raises:
        InputError: No member can explain an example, or the mixture is not linear.
    """
    if manifest.combine != "linear":
        raise InputError(
            f"feedback refits the weights of linear mixtures, and this one is {manifest.combine}",
            "Fit its weights again on examples: edgemix export.",
        )
    names = [member.name for member in manifest.members]
    counts = manifest.counts or {name: _ASSUMED * share for name, share in manifest.weights.default.items()}
    fitted = fit_weights(log_probabilities, present, np.array([counts[name] for name in names]))
    weights = msgspec.structs.replace(manifest.weights, default=_named(names, fitted.weights))
    return msgspec.structs.replace(manifest, weights=weights, counts=_named(names, fitted.counts))


def feedback_of(
    before: Mapping[str, float], after: Mapping[str, float], *, right: NDArray[np.bool_], right_after: NDArray[np.bool_]
) -> Feedback:
    """Return what changed."""
    return Feedback(dict(before), dict(after), len(right), float(right.mean()), float(right_after.mean()))


def _named(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
