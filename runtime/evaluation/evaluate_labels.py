"""Evaluate a mixture over labels: each member, the uniform mixture, and the mixture with the bundle's weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.results.labels import LabelEvaluation, LabelRow
from edgemix.runtime.classification.token_classifier import TokenClassifier
from edgemix.runtime.evaluation.label_metrics import entity_scores, label_figures, multi_label_figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.recipe.labeled import Example
    from edgemix.results.labels import LabelFigures, RowKind
    from edgemix.runtime.classification.encoding import Text
    from edgemix.runtime.classification.loaded import LabelMixture

_TIMED = 256
"""Texts that speed is measured on."""


def evaluate(
    classifier: LabelMixture,
    examples: Mapping[str, Sequence[Example]],
    *,
    speed: bool = True,
    progress: Progress = NO_PROGRESS,
) -> LabelEvaluation:
    """Measure how well a classifier predicts the labels of examples.

    Args:
        classifier: The loaded bundle.
        examples: Domain -> examples.
        speed: Measure texts per second, too.
        progress: Progress callback.

    Raises:
        InputError: There are no examples, or none of their labels is the classifier's.
    """
    if not examples:
        raise InputError("there are no examples to evaluate on")
    for domain, found in examples.items():
        if not {label for example in found for label in example.labels or ()} & set(classifier.labels):
            raise InputError(
                f"{domain}: none of its labels is the bundle's, which are {', '.join(classifier.labels[:20])}",
                "Name the labels as the bundle does.",
            )
    everything = [example for part in examples.values() for example in part]
    texts, pairs = _texts(everything)
    with progress.stage("evaluate"):
        scores, counts = classifier.score_texts(texts, pairs)
    scored = _Scored(classifier, *classifier.spread_all(scores), everything, counts, _places(examples))
    rows = [scored.row(name, kind, shares) for name, (kind, shares) in _mixtures(classifier).items()]
    if speed:
        rows = _timed(classifier, rows, texts[:_TIMED], pairs and pairs[:_TIMED])
    return LabelEvaluation(classifier.task, tuple(rows), _own_name(classifier))


def _mixtures(classifier: LabelMixture) -> dict[str, tuple[RowKind, NDArray[np.float64]]]:
    members, own = classifier.members, _own_name(classifier)
    found: dict[str, tuple[RowKind, NDArray[np.float64]]] = {}
    found |= {name: ("member", np.eye(len(members))[place]) for place, name in enumerate(members)}
    if len(members) > 1:
        found["uniform"] = ("mixture", np.full(len(members), 1 / len(members)))
        found[own] = ("mixture", classifier.shares())
        for domain in classifier.manifest.weights.domains:
            found[f"fitted to {domain}"] = ("mixture", classifier.shares(domain))
    return found


def _own_name(classifier: LabelMixture) -> str:
    if len(classifier.members) == 1:
        return classifier.members[0]
    return {"uniform": "uniform", "given": "given", "fit": "fitted"}[classifier.manifest.weights.method]


def _places(examples: Mapping[str, Sequence[Example]]) -> dict[str, slice]:
    """Return which examples are a domain's."""
    found, start = {}, 0
    for domain, part in examples.items():
        found[domain] = slice(start, start + len(part))
        start += len(part)
    return found


@dataclass(frozen=True)
class _Scored:
    """What the members of a mixture said of examples.

    Attributes:
        mixture: The loaded bundle.
        log_probabilities: float64 [members, predictions, labels (, 2)].
        present: bool [members, predictions].
        examples: The examples.
        counts: Predictions of each.
        places: Domain -> its examples.
    """

    mixture: LabelMixture
    log_probabilities: NDArray[np.float64]
    present: NDArray[np.bool_]
    examples: Sequence[Example]
    counts: Sequence[int]
    places: Mapping[str, slice]

    def row(self, name: str, kind: RowKind, shares: NDArray[np.float64]) -> LabelRow:
        """Return the figures of a mixture with these weights."""
        mixed = self.mixture.mix(self.log_probabilities, shares, self.mixture.manifest.combine, self.present)
        answered: NDArray[np.bool_] = np.logical_or.reduce(self.present[shares > 0], axis=0)
        return LabelRow(
            name=name,
            kind=kind,
            weights=dict(zip(self.mixture.members, shares.tolist(), strict=True)),
            domains={domain: self._figures(mixed, answered, place) for domain, place in self.places.items()},
            overall=self._figures(mixed, answered, slice(None)),
        )

    def _figures(self, mixed: NDArray[np.float64], answered: NDArray[np.bool_], place: slice) -> LabelFigures:
        labels, chosen, counts = self.mixture.labels, self.examples[place], self.counts[place]
        start = sum(self.counts[: place.start or 0])
        rows = slice(start, start + sum(counts))
        share = float(np.mean(answered[rows])) if sum(counts) else 0.0
        if self.mixture.manifest.multi_label:
            sets = np.array([[label in (each.labels or ()) for label in labels] for each in chosen], np.bool_)
            return multi_label_figures(mixed[rows], sets, labels, answered=share)
        order = {label: number for number, label in enumerate(labels)}
        targets = np.array([order.get(name, -1) for each in chosen for name in each.labels or ()], np.int64)
        figures = label_figures(mixed[rows], targets, labels, answered=share)
        if not isinstance(self.mixture, TokenClassifier):
            return figures
        found = self.mixture.consistent(mixed[rows], counts)
        overall, types = entity_scores(found, [each.labels or () for each in chosen])
        return replace(figures, entity_f1=overall.f1, entities=types)


def _timed(
    classifier: Any, rows: list[LabelRow], texts: Sequence[Text], pairs: Sequence[Text] | None
) -> list[LabelRow]:
    """Return the rows of members and of the default mixture with texts per second, the better of two runs."""
    own = _own_name(classifier)

    def seconds(row: LabelRow) -> float:
        begun = time.perf_counter()
        classifier.predict_batch(texts, *(() if pairs is None else (pairs,)), weights=row.weights)
        return time.perf_counter() - begun

    return [
        replace(row, throughput=len(texts) / min(seconds(row), seconds(row)))
        if row.kind == "member" or row.name == own
        else row
        for row in rows
    ]


def _texts(examples: Sequence[Example]) -> tuple[list[str | list[str]], list[str] | None]:
    texts = [list(each.text) if isinstance(each.text, tuple) else each.text for each in examples]
    pairs = [each.pair for each in examples]
    if all(pair is None for pair in pairs):
        return texts, None
    return texts, [pair or "" for pair in pairs]
