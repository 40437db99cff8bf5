"""The results of an evaluation of a mixture over labels: plain data that commands and reports read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowKind = Literal["member", "mixture", "student"]


@dataclass(frozen=True, slots=True)
class LabelScore:
    """Precision, recall and F1 of a label or an entity type.

    Attributes:
        precision: Right among those that were predicted; 0 where none was.
        recall: Found among those that there are; 0 where there are none.
        f1: Their harmonic mean; 0 where both are.
        support: How many there are.
    """

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Predictions of similar confidence: how sure they are on average, how often they are right, and how many."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """The quality of predictions on labeled examples.

    Attributes:
        examples: Number of predictions: of texts, of words, or, where several labels are allowed, of texts.
        accuracy: Share of right ones; where several labels are allowed, of texts with exactly their labels.
        macro_f1: Mean F1 of the labels that examples or predictions have.
        nll: Mean negative log-probability of the right label, in nats.
        brier: Mean squared error of the probabilities, summed over labels.
        calibration_error: Mean distance of confidence and accuracy over 15 bins of equal width, weighted by their size.
        labels: Scores by label.
        confusion: True label -> predicted label -> count; without counts of zero. Empty where several are allowed.
        bins: The calibration curve.
        entity_f1: Micro F1 of entities, of token-classification only.
        entities: Scores by entity type.
        answered: Share of examples on which the member has an opinion.
    """

    examples: int
    accuracy: float
    macro_f1: float
    nll: float
    brier: float
    calibration_error: float
    labels: dict[str, LabelScore]
    confusion: dict[str, dict[str, int]]
    bins: tuple[CalibrationBin, ...]
    entity_f1: float | None = None
    entities: dict[str, LabelScore] | None = None
    answered: float = 1.0


@dataclass(frozen=True, slots=True)
class LabelRow:
    """The figures of one member or mixture, by domain and over all examples."""

    name: str
    kind: RowKind
    weights: dict[str, float]
    domains: dict[str, LabelFigures]
    overall: LabelFigures
    throughput: float | None = None


@dataclass(frozen=True, slots=True)
class LabelEvaluation:
    """An evaluation.

    Attributes:
        task: The bundle's.
        rows: Members, then mixtures, then the student.
        default: Name of the row of the mixture as the bundle runs it.
    """

    task: str
    rows: tuple[LabelRow, ...]
    default: str
