"""`edgemix evaluate` of a bundle over labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemix.cli.console import Console
    from edgemix.results.labels import LabelEvaluation, LabelFigures


_MOST_COLUMNS, _MOST_ROWS = 12, 40
"""A terminal's width and a reader's patience; --json has all."""


def evaluate_labels(console: Console, bundle: Path, files: Sequence[Path], *, speed: bool, **loading: Any) -> None:
    """Measure how well a bundle predicts the labels of files' examples, and print it.

    Raises:
        InputError: A file has no labeled examples, or their labels are none of the bundle's.
    """
    import edgemix
    from edgemix.recipe.labeled import LabeledSource, read_examples
    from edgemix.runtime.evaluation.evaluate_labels import evaluate

    stems = Counter(file.stem for file in files)
    with edgemix.load(bundle, **loading) as mixture:
        examples = {
            file.stem if stems[file.stem] == 1 else str(file): read_examples(
                LabeledSource(str(file)), Path(), mixture.task
            )
            for file in files
        }
        found = evaluate(mixture, examples, speed=speed, progress=console.progress)
    if console.as_json:
        console.document({"bundle": bundle, "provider": mixture.provider, **asdict(found)})
        return
    show_label_evaluation(console, found)


def show_label_evaluation(console: Console, found: LabelEvaluation) -> None:
    """Print an evaluation: a table for each metric, with a row for each member and mixture, a column for each file."""
    names = [*found.rows[0].domains, "all files"]

    def metric(title: str, text: Callable[[LabelFigures], str]) -> None:
        rows = [(row.name, *(text(each) for each in (*row.domains.values(), row.overall))) for row in found.rows]
        console.table(title, ("", *names), rows)

    metric("Examples", lambda figures: f"{figures.examples:,}")
    if found.rows[0].overall.entity_f1 is not None:
        metric("Entity F1 (%)", lambda figures: f"{100 * (figures.entity_f1 or 0):.2f}")
    metric("Accuracy (%)", lambda figures: f"{100 * figures.accuracy:.2f}")
    metric("Macro F1 (%)", lambda figures: f"{100 * figures.macro_f1:.2f}")
    metric("Negative log-likelihood (nats)", lambda figures: f"{figures.nll:.4f}")
    metric("Expected calibration error (%)", lambda figures: f"{100 * figures.calibration_error:.2f}")
    if any(row.overall.answered < 1 for row in found.rows):
        metric("Answered (%)", lambda figures: f"{100 * figures.answered:.1f}")
    default = next(row for row in found.rows if row.name == found.default)
    labels = default.overall.labels
    console.table(
        f"Labels ({default.name} weights)",
        ("Label", "Precision (%)", "Recall (%)", "F1 (%)", "Examples"),
        [
            (label, *(f"{100 * value:.2f}" for value in (each.precision, each.recall, each.f1)), f"{each.support:,}")
            for label, each in list(labels.items())[:_MOST_ROWS]
        ],
    )
    confusion = default.overall.confusion
    if 0 < len(confusion) <= _MOST_COLUMNS:
        columns = list(dict.fromkeys(name for row in confusion.values() for name in row))
        rows = [(label, *(f"{row.get(name, 0):,}" for name in columns)) for label, row in confusion.items()]
        console.table("Confusion (rows: the right label; columns: the prediction)", ("", *columns), rows)
    rates = [(row.name, f"{row.throughput:,.0f}") for row in found.rows if row.throughput is not None]
    if rates:
        console.table("Texts per second on this machine", ("", "Texts/s"), rates)
