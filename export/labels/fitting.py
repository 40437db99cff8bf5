"""Fit temperatures, the prior of labels and the mixture's weights on validation examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from edgemix.bundle.manifest import Weights
from edgemix.errors import InputError
from edgemix.export.labels.examples import label_sets, texts_of
from edgemix.runtime.classification.calibration import (
    fit_label_temperature,
    fit_temperature,
    label_prior,
    label_shares,
)
from edgemix.runtime.classification.fitting import WeightFit, climb, fit_weights
from edgemix.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.label_bundle.manifest import LabelManifest
    from edgemix.export.labels.examples import RecipeExamples
    from edgemix.progress import Progress
    from edgemix.recipe.labeled import Example
    from edgemix.recipe.labels import LabelRecipe
    from edgemix.runtime.classification.loaded import LabelMixture
    from edgemix.runtime.classification.members import Scores

_PRIOR = 1.0
"""Pseudo-count of each member: what a few examples say of the weights is taken with care."""


def fit_label_mixture(
    bundle: Path, manifest: LabelManifest, recipe: LabelRecipe, examples: RecipeExamples, progress: Progress
) -> LabelManifest:
    """Return the manifest with temperatures, prior, and weights fitted on the validation examples.

    Args:
        bundle: The folder of the members' files.
        manifest: Without them.
        recipe: Says what is fitted.
        examples: The recipe's.
        progress: Progress callback.
    """
    everything = [example for part in examples.validation.values() for example in part]
    texts, pairs = texts_of(everything)
    runs: type[LabelMixture] = TASKS[manifest.task].load("runtime_class")
    with runs.assemble(bundle, manifest, "cpu") as mixture:
        with progress.stage("score validation examples"):
            scores, counts = mixture.score_texts(texts, pairs)
        known = _Known.of(mixture, everything, counts)
    if recipe.calibrate and manifest.labels:
        manifest = _calibrated(manifest, scores, known)
    if manifest.labels:
        manifest = msgspec.structs.replace(manifest, prior=tuple(known.prior().tolist()))
    if not recipe.fits_weights:
        return manifest
    with runs.assemble(bundle, manifest, "cpu") as mixture:
        logs, present = mixture.spread_all(scores)
        weights, draws = _weights(mixture, logs, present, known, examples)
    return msgspec.structs.replace(manifest, weights=weights, counts=draws)


class _Known(NamedTuple):
    """What is known of the predictions of examples.

    Attributes:
        labels: The mixture's.
        names: The right label of each prediction; "" without one. Of examples with several labels none.
        sets: bool [examples, labels], of those.
        counts: Predictions of each example.
    """

    labels: tuple[str, ...]
    names: list[str]
    sets: NDArray[np.bool_] | None
    counts: list[int]

    @classmethod
    def of(cls, mixture: LabelMixture, everything: Sequence[Example], counts: list[int]) -> _Known:
        """Return what examples say.

        Raises:
            InputError: An example has another number of labels than of predictions.
        """
        if mixture.manifest.multi_label:
            return cls(mixture.labels, [], label_sets(everything, mixture.labels), counts)
        names: list[str] = []
        for place, (example, count) in enumerate(zip(everything, counts, strict=True), start=1):
            own = example.labels or ()
            if len(own) != count:
                raise InputError(f"validation example {place} has {len(own)} labels for {count} predictions")
            names += own
        return cls(mixture.labels, names, None, counts)

    def targets(self, labels: Sequence[str]) -> NDArray[np.int64]:
        """Return the column of each prediction's label, -1 for one that is not among `labels`."""
        places = {label: place for place, label in enumerate(labels)}
        return np.array([places.get(name, -1) for name in self.names], np.int64)

    def prior(self) -> NDArray[np.float64]:
        """Return the share of each label."""
        if self.sets is not None:
            return label_shares(self.sets)
        return label_prior(self.targets(self.labels), len(self.labels))

    def right(self, logs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return log-probabilities [..., predictions] of the right labels, of several labels their sum over them."""
        if self.sets is None:
            targets = self.targets(self.labels)
            return np.where(targets >= 0, logs[..., np.arange(len(targets)), np.maximum(targets, 0)], -np.inf)
        chosen = np.broadcast_to(self.sets[..., None].astype(np.int64), (*logs.shape[:-1], 1))
        return np.take_along_axis(logs, chosen, axis=-1)[..., 0]


def _calibrated(manifest: LabelManifest, scores: Sequence[Scores], known: _Known) -> LabelManifest:
    members = []
    for member, found in zip(manifest.members, scores, strict=True):
        if known.sets is not None:
            columns = [known.labels.index(label) for label in member.labels]
            temperature = fit_label_temperature(found.logits[found.present], known.sets[found.present][:, columns])
        else:
            targets = np.where(found.present, known.targets(member.labels), -1)
            temperature = fit_temperature(found.logits, targets)
        members.append(msgspec.structs.replace(member, temperature=temperature))
    return msgspec.structs.replace(manifest, members=tuple(members))


def _weights(
    mixture: LabelMixture,
    logs: NDArray[np.float64],
    present: NDArray[np.bool_],
    known: _Known,
    examples: RecipeExamples,
) -> tuple[Weights, dict[str, float]]:
    """Return the weights over all examples and by domain, and the counts that feedback begins with."""
    names, right = mixture.members, known.right(logs)

    def fit(rows: NDArray[np.int64]) -> WeightFit:
        own, asked = right[:, rows], present[:, rows]
        if known.sets is not None:
            asked = (asked[..., None] & mixture.known[:, None]).reshape(len(names), -1)
            own = own.reshape(len(names), -1)
        linear = fit_weights(own, asked, np.full(len(names), _PRIOR / len(names)))
        if mixture.manifest.combine == "linear":
            return linear

        def score(weights: NDArray[np.float64]) -> float:
            mixed = mixture.mix(logs[:, rows], weights, mixture.manifest.combine, present[:, rows])
            return float(np.maximum(_subset(known, rows).right(mixed), -50).mean())

        return WeightFit(climb(score, len(names)), linear.counts)

    everything = np.arange(present.shape[1])
    whole, domains, start, example = fit(everything), {}, 0, 0
    for domain, part in examples.validation.items():
        count = sum(known.counts[example : example + len(part)])
        domains[domain] = _named(names, fit(everything[start : start + count]).weights)
        start, example = start + count, example + len(part)
    return Weights("fit", _named(names, whole.weights), domains), _named(names, whole.counts)


def _subset(known: _Known, rows: NDArray[np.int64]) -> _Known:
    if known.sets is not None:
        return known._replace(sets=known.sets[rows])
    return known._replace(names=[known.names[row] for row in rows])


def _named(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
