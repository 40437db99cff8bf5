"""`edgemix finetune`: a domain expert as a LoRA adapter."""

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
    from edgemix.export.finetune import FinetuneReport


@command(
    "finetune",
    example="edgemix finetune ./SmolLM2-135M law.txt -o adapters/law --minutes 10",
    extra="export,cpu",
    kept="Steps done so far are kept: run the same command to go on.",
)
@click.argument("base")
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", "adapter", type=click.Path(path_type=Path), required=True, help="The adapter's folder.")
@template_option
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
    adapter: Path,
    template: str | None,
    **training: Any,
) -> None:
    """Fine-tune BASE on texts, as a LoRA adapter.

    BASE is a folder, a hub id or a .gguf file; a recipe can name the adapter. A part of the text is held out to measure
    the loss on. A run that was stopped goes on when it is started again.
    """
    documents = [document for file in read_files(texts, template).values() for document in file]
    with console.progress.stage("import torch"):
        from edgemix.export.finetune import finetune as train

    report = train(base, adapter, documents, progress=console.progress, **training)
    if console.as_json:
        console.document(asdict(report))
        return
    console.table("Fine-tuning", ("", ""), _facts(report), left=2)
    console.line(f"In a recipe: {{name: {adapter.name}, model: {base}, adapter: {adapter}}}")


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
