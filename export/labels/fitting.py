"""Fit temperatures, the prior of labels and the mixture's weights on validation examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgemix.bundle.manifest import Weights
from edgemix.export.labels.examples import label_sets, targets_of, texts_of
from edgemix.runtime.classification.calibration import (
    fit_label_temperature,
    fit_temperature,
    label_prior,
    label_shares,
)
from edgemix.runtime.classification.classifier import Classifier
from edgemix.runtime.classification.fitting import climb, fit_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.label_bundle.manifest import LabelManifest
    from edgemix.export.labels.examples import RecipeExamples
    from edgemix.progress import Progress
    from edgemix.recipe.labelled import Example
    from edgemix.recipe.labels import LabelRecipe
    from edgemix.runtime.classification.classifier import Opinions

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
    if recipe.task == "text-classification":
        return _fit_classifier(bundle, manifest, recipe, examples, progress)
    return manifest


def _fit_classifier(
    bundle: Path, manifest: LabelManifest, recipe: LabelRecipe, examples: RecipeExamples, progress: Progress
) -> LabelManifest:
    everything = [example for part in examples.validation.values() for example in part]
    texts, pairs = texts_of(everything)
    with Classifier.assemble(bundle, manifest, "cpu") as classifier:
        with progress.stage("score validation examples", len(classifier.models)) as task:
            scores = []
            for model in classifier.models:
                scores.append(model.score(texts, pairs))
                task.advance(note=model.name)
        if recipe.calibrate:
            manifest = _calibrated(manifest, scores, everything)
    prior = _prior(manifest, everything)
    manifest = msgspec.structs.replace(manifest, prior=tuple(prior.tolist()))
    with Classifier.assemble(bundle, manifest, "cpu") as classifier:
        opinions = classifier.opinions_of(scores)
        if recipe.fits_weights:
            weights, counts = _weights(classifier, opinions, examples, everything)
            manifest = msgspec.structs.replace(manifest, weights=weights, counts=counts)
    return manifest


def _calibrated(manifest: LabelManifest, scores: Sequence[Any], everything: list[Example]) -> LabelManifest:
    members = []
    for member, found in zip(manifest.members, scores, strict=True):
        if manifest.multi_label:
            sets = label_sets(everything, member.labels)[found.present]
            temperature = fit_label_temperature(found.logits[found.present], sets)
        else:
            targets = np.where(found.present, targets_of(everything, member.labels), -1)
            temperature = fit_temperature(found.logits, targets)
        members.append(msgspec.structs.replace(member, temperature=temperature))
    return msgspec.structs.replace(manifest, members=tuple(members))


def _prior(manifest: LabelManifest, everything: list[Example]) -> NDArray[np.float64]:
    if manifest.multi_label:
        return label_shares(label_sets(everything, manifest.labels))
    return label_prior(targets_of(everything, manifest.labels), len(manifest.labels))


def _weights(
    classifier: Classifier, opinions: Opinions, examples: RecipeExamples, everything: list[Example]
) -> tuple[Weights, dict[str, float]]:
    """Return the weights over all examples and by domain, and the counts that feedback begins with."""
    places, start = {}, 0
    for domain, part in examples.validation.items():
        places[domain] = np.arange(start, start + len(part))
        start += len(part)
    whole, counts = fit_opinions(classifier, opinions, everything, np.arange(len(everything)))
    domains = {domain: fit_opinions(classifier, opinions, everything, rows)[0] for domain, rows in places.items()}
    names = classifier.members
    weights = Weights("fit", _named(names, whole), {domain: _named(names, found) for domain, found in domains.items()})
    return weights, _named(names, counts)


def fit_opinions(
    classifier: Classifier, opinions: Opinions, examples: Sequence[Example], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights fitted to some of the examples, and each member's draws; see `classification.fitting`."""
    manifest, logs = classifier.manifest, opinions.log_probabilities[:, rows]
    present, chosen = opinions.present[:, rows], [examples[row] for row in rows]
    members = len(classifier.members)
    if manifest.multi_label:
        sets = label_sets(chosen, manifest.labels)
        right = np.take_along_axis(logs, sets[None, ..., None].astype(np.int64), axis=-1)[..., 0]
        asked = present[..., None] & classifier.known[:, None]
        right, present = right.reshape(members, -1), asked.reshape(members, -1)
    else:
        targets = targets_of(chosen, manifest.labels)
        right = logs[:, np.arange(len(rows)), targets]
    prior = np.full(members, _PRIOR / members)
    linear = fit_weights(right, present, prior)
    if manifest.combine == "linear":
        return linear.weights, linear.counts

    def score(weights: NDArray[np.float64]) -> float:
        mixed = classifier.mix(logs, weights, manifest.combine, opinions.present[:, rows])
        if manifest.multi_label:
            own = np.take_along_axis(mixed, sets[..., None].astype(np.int64), axis=-1)
        else:
            own = mixed[np.arange(len(rows)), targets]
        return float(np.maximum(own, -50).mean())

    return climb(score, members), linear.counts


def _named(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
