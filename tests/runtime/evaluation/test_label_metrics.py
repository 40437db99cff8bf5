"""Metrics of labels against counts by hand."""

import numpy as np
import pytest

from edgemix.runtime.evaluation.label_metrics import (
    calibration_curve,
    calibration_error,
    entity_scores,
    entity_spans,
    label_figures,
    multi_label_figures,
)


def test_one_label_each():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    found = label_figures(np.log(probabilities), np.array([0, 1, 1, -1]), ("a", "b"))
    assert found.accuracy == 0.5
    assert found.labels["a"].precision == 0.5
    assert (found.labels["b"].precision, found.labels["b"].recall) == (0.5, 0.5)
    assert found.confusion == {"a": {"a": 1}, "b": {"a": 1, "b": 1}, "(unknown)": {"b": 1}}
    assert found.nll == np.inf  # a label that the mixture does not have is impossible
    known = label_figures(np.log(probabilities[:3]), np.array([0, 1, 1]), ("a", "b"))
    assert known.nll == pytest.approx(-np.log([0.9, 0.6, 0.3]).mean())
    assert known.brier == pytest.approx(2 * np.mean([0.1**2, 0.4**2, 0.7**2]))


def test_calibration():
    curve = calibration_curve(np.array([0.91, 0.92, 0.51, 1.0]), np.array([True, False, False, True]))
    assert [each.count for each in curve] == [1, 2, 1]
    assert calibration_error(curve) == pytest.approx((0.51 + 2 * abs(0.915 - 0.5) + 0) / 4)


def test_several_labels_each():
    yes = np.array([[0.9, 0.2], [0.4, 0.7]])
    found = multi_label_figures(np.log(np.stack([1 - yes, yes], -1)), np.array([[1, 0], [1, 1]], bool), ("a", "b"))
    assert found.accuracy == 0.5
    assert found.labels["a"].recall == 0.5
    assert found.nll == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.7]).sum() / 2)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        # seqeval 1.2.2, classification_report's micro averages and types
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", (1.0, 1.0, {"PER": 1.0, "LOC": 1.0})),
        ("B-PER O O B-LOC", "B-PER I-PER O B-LOC", (0.5, 0.5, {"PER": 0.0, "LOC": 1.0})),
        ("I-PER I-PER O I-LOC", "B-PER I-PER O B-LOC", (1.0, 1.0, {"PER": 1.0, "LOC": 1.0})),
        ("B-PER B-PER O O", "B-PER I-PER O O", (0.0, 0.0, {"PER": 0.0})),
        ("I-PER I-LOC O O", "B-PER B-LOC O O", (1.0, 1.0, {"PER": 1.0, "LOC": 1.0})),
        ("O O O O", "B-PER O O O", (0.0, 0.0, {"PER": 0.0})),
    ],
)
def test_entities_are_counted_as_conlleval_counts_them(predicted, truth, expected):
    overall, types = entity_scores([predicted.split()], [truth.split()])
    assert (overall.precision, overall.recall) == expected[:2]
    assert {name: each.f1 for name, each in types.items()} == expected[2]


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("B-X-Y I-X-Y O", [("X-Y", 0, 1)]),
        (
            "B-PER I-PER S-LOC I-PER E-PER I-PER B-PER I-PER",
            [("PER", 0, 1), ("LOC", 2, 2), ("PER", 3, 4), ("PER", 5, 5), ("PER", 6, 7)],
        ),
        ("S-PER S-PER I-PER", [("PER", 0, 0), ("PER", 1, 1), ("PER", 2, 2)]),
    ],
)
def test_entities_end_where_seqeval_ends_them(labels, spans):
    """Spans from seqeval 1.2.2; guards: E-X and S-X did not end an entity."""
    assert entity_spans(labels.split()) == spans
