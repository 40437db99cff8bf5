"""Evaluate a mixture over labels: each member, the uniform mixture, and the mixture with the bundle's weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.results.labels import LabelEvaluation, LabelRow
from edgemix.runtime.evaluation.label_metrics import label_figures, multi_label_figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.recipe.labelled import Example
    from edgemix.results.labels import LabelFigures, RowKind
    from edgemix.runtime.classification.classifier import Classifier, Opinions

_TIMED = 256
"""Texts that speed is measured on."""


def evaluate(
    classifier: Classifier,
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
    with progress.stage("evaluate", len(classifier.models)) as task:
        scores = []
        for model in classifier.models:
            scores.append(model.score(texts, pairs))
            task.advance(note=model.name)
    opinions = classifier.opinions_of(scores)
    places, start = {}, 0
    for domain, part in examples.items():
        places[domain] = np.arange(start, start + len(part))
        start += len(part)
    scored = _Scored(classifier, opinions, everything, places)
    rows = [scored.row(name, kind, shares) for name, (kind, shares) in _mixtures(classifier).items()]
    if speed:
        rows = _timed(classifier, rows, texts[:_TIMED], pairs and pairs[:_TIMED])
    return LabelEvaluation(classifier.task, tuple(rows), _own_name(classifier))


def _mixtures(classifier: Classifier) -> dict[str, tuple[RowKind, NDArray[np.float64]]]:
    members, own = classifier.members, _own_name(classifier)
    found: dict[str, tuple[RowKind, NDArray[np.float64]]] = {}
    found |= {name: ("member", np.eye(len(members))[place]) for place, name in enumerate(members)}
    if len(members) > 1:
        found["uniform"] = ("mixture", np.full(len(members), 1 / len(members)))
        found[own] = ("mixture", classifier.shares())
        for domain in classifier.manifest.weights.domains:
            found[f"fitted to {domain}"] = ("mixture", classifier.shares(domain))
    return found


def _own_name(classifier: Classifier) -> str:
    if len(classifier.members) == 1:
        return classifier.members[0]
    return {"uniform": "uniform", "given": "given", "fit": "fitted"}[classifier.manifest.weights.method]


@dataclass(frozen=True)
class _Scored:
    """What the members of a classifier said of examples.

    Attributes:
        places: Domain -> indices of its examples.
    """

    classifier: Classifier
    opinions: Opinions
    examples: Sequence[Example]
    places: Mapping[str, NDArray[np.int64]]

    def row(self, name: str, kind: RowKind, shares: NDArray[np.float64]) -> LabelRow:
        """Return the figures of a mixture with these weights."""
        opinions, how = self.opinions, self.classifier.manifest.combine
        mixed = self.classifier.mix(opinions.log_probabilities, shares, how, opinions.present)
        answered: NDArray[np.bool_] = np.logical_or.reduce(opinions.present[shares > 0], axis=0)
        return LabelRow(
            name=name,
            kind=kind,
            weights=dict(zip(self.classifier.members, shares.tolist(), strict=True)),
            domains={domain: self._figures(mixed, answered, rows) for domain, rows in self.places.items()},
            overall=self._figures(mixed, answered, np.arange(len(self.examples))),
        )

    def _figures(
        self, mixed: NDArray[np.float64], answered: NDArray[np.bool_], rows: NDArray[np.int64]
    ) -> LabelFigures:
        labels, chosen = self.classifier.labels, [self.examples[row].labels or () for row in rows]
        share = float(np.mean(answered[rows]))
        if self.classifier.manifest.multi_label:
            sets = np.array([[label in own for label in labels] for own in chosen], np.bool_)
            return multi_label_figures(mixed[rows], sets, labels, answered=share)
        order = {label: place for place, label in enumerate(labels)}
        targets = np.array([order.get(own[0], -1) if own else -1 for own in chosen], np.int64)
        return label_figures(mixed[rows], targets, labels, answered=share)


def _timed(
    classifier: Classifier, rows: list[LabelRow], texts: Sequence[object], pairs: Sequence[object] | None
) -> list[LabelRow]:
    """Return the rows of members and of the default mixture with texts per second, the better of two runs."""
    own = _own_name(classifier)

    def seconds(row: LabelRow) -> float:
        begun = time.perf_counter()
        classifier.predict_batch(texts, pairs, weights=row.weights)  # type: ignore[arg-type]
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
