"""`edgemix finetune`: train a LoRA adapter for a model, or adapters for all members of a recipe."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import bounded_option, seed_option, template_option, training_limit_options
from edgemix.cli.outputs import has_work
from edgemix.cli.texts import read_files

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.export.finetuning.finetune import FinetuneReport
    from edgemix.export.finetuning.joint import MixtureReport

_RECIPES = (".yaml", ".yml")


@command(
    "finetune",
    example="edgemix finetune ./SmolLM2-135M law.txt -o adapters/law --minutes 10\n"
    "edgemix finetune recipe.yaml -o tuned",
    extra="export,cpu",
    on_interrupt="The steps so far are kept: run the same command to go on.",
    work=lambda arguments: has_work(arguments["output"]),
)
@click.argument("base", metavar="BASE|RECIPE")
@click.argument("texts", metavar="[TEXT...]", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the adapter; for a recipe, of all adapters and the new recipe.",
)
@template_option
@click.option("--separate", is_flag=True, help="Fine-tune each member of RECIPE alone, not jointly.")
@click.option("--qlora", "four_bit", is_flag=True, help="Train with 4-bit base weights: slower, far less memory.")
@click.option(
    "--rank", metavar="N", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapter."
)
@training_limit_options(steps="200 without --minutes", minutes="no limit")
@bounded_option("--batch", metavar="N", field="Student.batch", default=8, show_default=True, help="Sequences per step.")
@bounded_option(
    "--length", metavar="N", field="Student.length", default=256, show_default=True, help="Tokens per sequence."
)
@bounded_option(
    "--learning-rate",
    metavar="X",
    field="Student.learning_rate",
    default=5e-4,
    show_default=True,
    help="Peak learning rate.",
)
@seed_option("Seed, for repeatable training.")
def finetune(
    console: Console,
    *,
    base: str,
    texts: tuple[Path, ...],
    output: Path,
    template: str | None,
    separate: bool,
    **options: Any,
) -> None:
    """Train LoRA adapters for BASE or for RECIPE's members.

    BASE is a folder, a hub id or a .gguf file. Part of the text is held out to measure the loss. A recipe can name the
    adapter.

    The members of a RECIPE (.yaml) are trained jointly, on the likelihood of their mixture: each learns most from the
    text that it predicts best. They are trained on the recipe's training text, or on the texts given; losses are
    measured on its validation text. Writes an adapter for each member, and a recipe that names them.

    An interrupted run continues when it is started again.
    """
    is_recipe = Path(base).suffix.lower() in _RECIPES
    if separate and not is_recipe:
        raise click.UsageError("--separate is for recipes: a single model is always fine-tuned alone.")
    if not texts and not is_recipe:
        raise click.UsageError("Missing argument 'TEXT...': the training text for BASE.")
    domains = read_files(texts, template) if texts or template else None
    if is_recipe:
        _finetune_recipe(console, Path(base), output, domains, separate=separate, **options)
        return
    from edgemix.export.training.output_folder import check_output

    documents = [document for file in (domains or {}).values() for document in file]
    check_output(output)  # report mistakes before the slow import of torch
    with console.progress.stage("import torch"):
        from edgemix.export.finetuning.finetune import finetune as train

    report = train(base, output, documents, progress=console.progress, **options)
    if console.as_json:
        console.document(asdict(report))
        return
    console.table("Fine-tuning", ("", ""), _report_rows(report), left=2)
    console.line(f"In a recipe: {{name: {output.name}, model: {base}, adapter: {output}}}")


def _finetune_recipe(
    console: Console, path: Path, output: Path, texts: dict[str, list[str]] | None, **options: Any
) -> None:
    from edgemix.export.training.output_folder import check_output
    from edgemix.recipe.load import load_recipe

    recipe = load_recipe(path)  # report mistakes before the slow import of torch
    check_output(output)
    with console.progress.stage("import torch"):
        from edgemix.export.finetuning.joint import finetune_mixture

    report = finetune_mixture(recipe, output, texts, progress=console.progress, **options)
    if console.as_json:
        console.document(asdict(report))
        return
    console.table("Fine-tuning", ("", ""), _work(report), left=2)
    columns = ("", "Weight", "Held-out loss before", "After")
    rows = [(each.name, f"{each.weight:.3f}", each.validation_before, each.validation_after) for each in report.members]
    rows.append(("mixture", "", report.validation_before, report.validation_after))
    console.table("Nats per token", columns, [(*row[:2], *map(_loss, row[2:])) for row in rows])
    console.line(f"Next: edgemix export {shlex.quote(str(report.recipe))} -o mixture")


def _work(report: MixtureReport) -> list[tuple[str, str]]:
    return [
        ("Members", "fine-tuned jointly" if report.joint else "each fine-tuned alone"),
        ("Work", f"{report.steps:,} steps, {report.tokens:,} tokens, {report.seconds:.0f} s"),
        ("Training loss", f"{report.training_loss:.4f} nats per token"),
    ]


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _report_rows(report: FinetuneReport) -> list[tuple[str, str]]:
    rows = [
        ("Adapter", f"{report.adapter}, {report.parameters / 1e6:.1f} M parameters"),
        ("Work", f"{report.steps:,} steps, {report.tokens:,} tokens, {report.seconds:.0f} s"),
        ("Training loss", f"{report.training_loss:.4f} nats per token"),
    ]
    if report.validation_before is not None and report.validation_after is not None:
        held_out = f"{report.validation_before:.4f} before, {report.validation_after:.4f} after (nats per token)"
        rows.append(("Held-out loss", held_out))
    return rows
