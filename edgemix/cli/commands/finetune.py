"""`edgemix finetune`: a domain expert as a LoRA adapter, or adapters for all members of a recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import Number, template_option
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
    kept="Steps done so far are kept: run the same command to go on.",
)
@click.argument("base", metavar="BASE|RECIPE")
@click.argument("texts", metavar="[TEXT...]", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The adapter's folder; for a recipe, that of the adapters and the new recipe.",
)
@template_option
@click.option(
    "--separate", is_flag=True, help="Tune each member of RECIPE alone, not through the mixture's likelihood."
)
@click.option("--qlora", "four_bit", is_flag=True, help="Keep models in 4 bits meanwhile: slower, far less memory.")
@click.option("--rank", metavar="N", type=click.IntRange(min=1), default=16, show_default=True, help="Of the adapter.")
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="200 without --minutes",
    help="Optimiser steps at most.",
)
@click.option(
    "--minutes",
    metavar="X",
    type=Number(min=0, min_open=True),
    show_default="no limit",
    help="Stop after so long; time before an interruption counts.",
)
@click.option(
    "--batch", metavar="N", type=click.IntRange(min=1), default=8, show_default=True, help="Pieces of text a step."
)
@click.option(
    "--length", metavar="N", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens a piece."
)
@click.option(
    "--learning-rate",
    metavar="X",
    type=Number(min=0, min_open=True),
    default=5e-4,
    show_default=True,
    help="At its highest.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Makes training repeatable.",
)
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
    """Fine-tune BASE on texts, as a LoRA adapter; or the members of RECIPE, jointly.

    BASE is a folder, a hub id or a .gguf file; a recipe can name the adapter. A part of the text is held out to measure
    the loss on.

    The members of a RECIPE (.yaml) learn through the likelihood of their mixture: each most from the text that it
    explains best. They read its training text, or the texts given; losses are measured on its validation text. What is
    written is an adapter for each, and a recipe that names them.

    A run that was stopped goes on when it is started again.
    """
    is_recipe = Path(base).suffix.lower() in _RECIPES
    if separate and not is_recipe:
        raise click.UsageError("--separate is for recipes: one model is tuned alone anyway.")
    if not texts and not is_recipe:
        raise click.UsageError("Missing argument 'TEXT...': what BASE shall learn from.")
    domains = read_files(texts, template) if texts or template else None
    if is_recipe:
        _finetune_recipe(console, Path(base), output, domains, separate=separate, **options)
        return
    from edgemix.export.training.output_folder import check_output

    documents = [document for file in (domains or {}).values() for document in file]
    check_output(output)  # mistakes shall not wait for torch
    with console.progress.stage("import torch"):
        from edgemix.export.finetuning.finetune import finetune as train

    report = train(base, output, documents, progress=console.progress, **options)
    if console.as_json:
        console.document(asdict(report))
        return
    console.table("Fine-tuning", ("", ""), _facts(report), left=2)
    console.line(f"In a recipe: {{name: {output.name}, model: {base}, adapter: {output}}}")


def _finetune_recipe(
    console: Console, path: Path, output: Path, texts: dict[str, list[str]] | None, **options: Any
) -> None:
    from edgemix.export.training.output_folder import check_output
    from edgemix.recipe.load import load_recipe

    recipe = load_recipe(path)  # mistakes shall not wait for torch
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
    console.table("Nats a token", columns, [(*row[:2], *map(_loss, row[2:])) for row in rows])
    console.line(f"Next: edgemix export {report.recipe} -o mixture")


def _work(report: MixtureReport) -> list[tuple[str, str]]:
    return [
        ("Members", "tuned jointly" if report.joint else "each tuned alone"),
        ("Work", f"{report.steps:,} steps, {report.tokens:,} tokens, {report.seconds:.0f} s"),
        ("Training loss", f"{report.training_loss:.4f} nats a token"),
    ]


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _facts(report: FinetuneReport) -> list[tuple[str, str]]:
    facts = [
        ("Adapter", f"{report.adapter}, {report.parameters / 1e6:.1f} M parameters"),
        ("Work", f"{report.steps:,} steps, {report.tokens:,} tokens, {report.seconds:.0f} s"),
        ("Training loss", f"{report.training_loss:.4f} nats a token"),
    ]
    if report.validation_before is not None and report.validation_after is not None:
        held_out = f"{report.validation_before:.4f} before, {report.validation_after:.4f} after (nats a token)"
        facts.append(("Held-out loss", held_out))
    return facts
