"""`edgemix feedback`: refit a bundle's weights to corrected answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import bundle_argument, runtime_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.cli.console import Console
    from edgemix.recipe.labeled import Example


@command(
    "feedback",
    example="edgemix feedback mixture corrections.jsonl --dry-run\n"
    "edgemix feedback mixture corrections.jsonl --training more.jsonl",
    extra="cpu",
    on_interrupt="The bundle keeps its old weights.",
)
@bundle_argument
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show the weights before and after, and change nothing.")
@click.option(
    "--training",
    type=click.Path(path_type=Path),
    help="Also write the corrections that the mixture had wrong, as examples to train members on.",
)
@runtime_options
def feedback(
    console: Console, *, bundle: Path, files: tuple[Path, ...], dry_run: bool, training: Path | None, **loading: Any
) -> None:
    """Refit BUNDLE's weights to corrected answers.

    FILES are .jsonl files with the right label of each text. They add to what the weights were fitted to, without the
    old examples; the bundle is changed in one step.
    """
    from edgemix.bundle.writer import check_writable
    from edgemix.recipe.labeled import LabeledSource, read_examples
    from edgemix.runtime.classification.classifier import Classifier

    examples = [
        example for file in files for example in read_examples(LabeledSource(str(file)), Path(), "text-classification")
    ]
    with Classifier.load(bundle, **loading) as classifier:
        if not dry_run:
            check_writable(bundle)
        texts = [list(each.text) if isinstance(each.text, tuple) else each.text for each in examples]
        predicted = classifier.predict_batch(texts, progress=console.progress) if training is not None else []
        found = classifier.feedback(texts, [(each.labels or ("",))[0] for each in examples], dry_run=dry_run)
        if training is not None:
            wrong = [each for each, own in zip(examples, predicted, strict=True) if (own.label,) != each.labels]
            _write(training, wrong)
        if not dry_run:
            classifier.save(bundle)
    if console.as_json:
        console.document({"bundle": bundle, "dry_run": dry_run, **asdict(found)})
        return
    console.table(
        f"Weights of {bundle}",
        ("Member", "Before", "After"),
        [(name, f"{found.before[name]:.3f}", f"{share:.3f}") for name, share in found.after.items()],
    )
    before, after = f"{100 * found.right:.1f}%", f"{100 * found.right_after:.1f}%"
    console.line(f"Of {found.examples:,} corrections the mixture had {before} right; with these weights {after}.")
    if dry_run:
        console.line("Nothing was changed.")


def _write(path: Path, examples: Sequence[Example]) -> None:
    import msgspec

    from edgemix.errors import storage_errors
    from edgemix.files import write_atomically

    lines = [msgspec.json.encode({"text": each.text, "label": (each.labels or ("",))[0]}) for each in examples]
    with storage_errors(f"writing {path}"):
        write_atomically(path, b"".join(line + b"\n" for line in lines))
