"""Metrics of predicted labels: accuracy, F1, likelihood, calibration, and entities as seqeval counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError
from edgemix.results.labels import CalibrationBin, LabelFigures, LabelScore

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

BINS = 15
"""Bins of equal width of the calibration curve."""


def label_figures(
    log_probabilities: NDArray[np.float64], targets: NDArray[np.int64], labels: Sequence[str], *, answered: float = 1.0
) -> LabelFigures:
    """Return the figures of predictions of one label each.

    Args:
        log_probabilities: float64 [examples, labels]; rows sum to one.
        targets: int64 [examples], the right labels; negative where the mixture has no such label.
        labels: Their names.
        answered: See `LabelFigures`.
    """
    count = len(targets)
    if not count:
        raise InputError("there is nothing to evaluate on: the examples have no words")
    probabilities, predicted = np.exp(log_probabilities), log_probabilities.argmax(axis=-1)
    known = np.maximum(targets, 0)
    own = np.where(targets >= 0, log_probabilities[np.arange(count), known], -np.inf)
    right = predicted == targets
    hits = np.zeros_like(probabilities)
    hits[np.arange(count), known] = targets >= 0
    bins = calibration_curve(probabilities.max(axis=-1), right)
    scores, confusion = _label_scores(predicted, targets, labels)
    return LabelFigures(
        examples=count,
        accuracy=float(right.mean()),
        macro_f1=_macro(scores),
        nll=float(-own.mean()),
        brier=float(((probabilities - hits) ** 2).sum(axis=-1).mean()),
        calibration_error=calibration_error(bins),
        labels=scores,
        confusion=confusion,
        bins=bins,
        answered=answered,
    )


def multi_label_figures(
    log_probabilities: NDArray[np.float64], targets: NDArray[np.bool_], labels: Sequence[str], *, answered: float = 1.0
) -> LabelFigures:
    """Return the figures of predictions of any number of labels each.

    Args:
        log_probabilities: float64 [examples, labels, 2], of no and yes.
        targets: bool [examples, labels].
        labels: Their names.
        answered: See `LabelFigures`.
    """
    yes = np.exp(log_probabilities[..., 1])
    predicted = log_probabilities[..., 1] > log_probabilities[..., 0]
    own = np.where(targets, log_probabilities[..., 1], log_probabilities[..., 0])
    bins = calibration_curve(np.maximum(yes, 1 - yes).ravel(), (predicted == targets).ravel())
    scores = {
        label: score(int((predicted & targets)[:, i].sum()), int(predicted[:, i].sum()), int(targets[:, i].sum()))
        for i, label in enumerate(labels)
    }
    return LabelFigures(
        examples=len(targets),
        accuracy=float((predicted == targets).all(axis=-1).mean()),
        macro_f1=_macro(scores),
        nll=float(-own.sum(axis=-1).mean()),
        brier=float(((yes - targets) ** 2).sum(axis=-1).mean()),
        calibration_error=calibration_error(bins),
        labels=scores,
        confusion={},
        bins=bins,
        answered=answered,
    )


def calibration_curve(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[CalibrationBin, ...]:
    """Return the bins (of equal width, 15) that have predictions, from the least confident."""
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return tuple(
        CalibrationBin(float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum()))
        for inside in (places == place for place in range(BINS))
        if inside.any()
    )


def calibration_error(bins: Iterable[CalibrationBin]) -> float:
    """Return the expected calibration error of a curve (Naeini et al. 2015)."""
    found = list(bins)
    total = sum(each.count for each in found)
    return sum(each.count * abs(each.confidence - each.accuracy) for each in found) / total if total else 0.0


def score(right: int, predicted: int, support: int) -> LabelScore:
    """Return precision, recall and F1 from counts."""
    precision, recall = right / predicted if predicted else 0.0, right / support if support else 0.0
    both = precision + recall
    return LabelScore(precision, recall, 2 * precision * recall / both if both else 0.0, support)


def _label_scores(
    predicted: NDArray[np.int64], targets: NDArray[np.int64], labels: Sequence[str]
) -> tuple[dict[str, LabelScore], dict[str, dict[str, int]]]:
    """Return the scores of the labels that occur, and the confusion counts."""
    truth = np.where(targets >= 0, targets, len(labels))
    occurring, places = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    truth, predicted = np.split(places, 2)
    names = [labels[label] if label < len(labels) else "(unknown)" for label in occurring]
    right = np.bincount(truth[truth == predicted], minlength=len(names))
    scores = {
        name: score(int(right[i]), int((predicted == i).sum()), int((truth == i).sum())) for i, name in enumerate(names)
    }
    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    confusion: dict[str, dict[str, int]] = {}
    for (one, other), count in zip(pairs.T, counts, strict=True):
        confusion.setdefault(names[one], {})[names[other]] = int(count)
    return scores, confusion


def _macro(scores: dict[str, LabelScore]) -> float:
    return float(np.mean([each.f1 for each in scores.values()])) if scores else 0.0


def entity_scores(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]
) -> tuple[LabelScore, dict[str, LabelScore]]:
    """Return the micro score of entities and the scores by type, as seqeval's default (conlleval's rules).

    An entity is right if its type, its first word and its last word are. One begins at B-X, and at I-X after O, after
    another type, or at the beginning.

    Args:
        predicted: Labels of each text's words.
        truth: The right ones.
    """
    found = {(text, *entity) for text, labels in enumerate(predicted) for entity in entity_spans(labels)}
    right = {(text, *entity) for text, labels in enumerate(truth) for entity in entity_spans(labels)}
    types = sorted({entity[1] for entity in found | right})
    by_type = {
        kind: score(
            sum(entity[1] == kind for entity in found & right),
            sum(entity[1] == kind for entity in found),
            sum(entity[1] == kind for entity in right),
        )
        for kind in types
    }
    return score(len(found & right), len(found), len(right)), by_type


def entity_spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return entities as their type, first word and last word, from labels B-X, I-X and O; E-X and S-X end one."""
    spans: list[tuple[str, int, int]] = []
    kind, start, before = "", 0, "O"
    for place, label in enumerate([*labels, "O"]):
        prefix, _, name = label.partition("-") if label != "O" else ("O", "", "")
        name = name or ("" if prefix == "O" else "_")
        begins = prefix in ("B", "S") or name != kind or before in ("E", "S")
        if kind and begins:
            spans.append((kind, start, place - 1))
        if begins:
            kind, start = name, place
        before = prefix
    return spans
