"""`edgemix prune`: prune a model, and save it as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.console import megabytes
from edgemix.cli.options import bounded_option, seed_option, template_option
from edgemix.cli.outputs import has_work
from edgemix.cli.texts import read_files

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.export.pruning.report import LayerReport, PruningReport


@command(
    "prune",
    example="edgemix prune ./SmolLM2-135M -o smaller --text prose.txt --ffn 0.25\n"
    "edgemix prune ./SmolLM2-135M -o sparse --text prose.txt --sparsity 0.5",
    extra="export,cpu",
    on_interrupt="The cuts and recovery steps so far are kept: run the same command to go on.",
    work=lambda arguments: has_work(arguments["output"]),
)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the pruned model.")
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Text like the model's inputs, .txt or .jsonl; may be repeated.",
)
@template_option
@click.option("--adapter", metavar="FOLDER", help="A LoRA adapter to merge into the model first.")
@bounded_option("--layers", metavar="X", field="Pruning.layers", default=0.0, help="Share of the layers to remove.")
@bounded_option(
    "--ffn", metavar="X", field="Pruning.ffn", default=0.0, help="Share of feed-forward channels to remove."
)
@bounded_option("--heads", metavar="X", field="Pruning.heads", default=0.0, help="Share of key-value groups to remove.")
@bounded_option(
    "--sparsity", metavar="X", field="Pruning.sparsity", default=0.0, help="Share of weights to set to zero."
)
@click.option(
    "--pattern",
    type=click.Choice(["unstructured", "2:4"]),
    default="unstructured",
    show_default=True,
    help="Positions of zeros: anywhere, or two of every four weights (a share of 0.5).",
)
@click.option(
    "--criterion",
    type=click.Choice(["wanda", "magnitude"]),
    default="wanda",
    show_default=True,
    help="Weights to set to zero: the smallest products with their input's norm, or the smallest.",
)
@bounded_option(
    "--steps",
    metavar="N",
    field="Pruning.steps",
    default=1,
    show_default=True,
    help="Number of cuts, each followed by recovery.",
)
@bounded_option(
    "--recover",
    metavar="MINUTES",
    field="Pruning.recover",
    default=5.0,
    show_default=True,
    help="Minutes of distillation from the unpruned model, over all cuts.",
)
@seed_option("Seed for choosing and ordering text.")
def prune(
    console: Console,
    *,
    model: str,
    output: Path,
    texts: tuple[Path, ...],
    template: str | None,
    adapter: str | None,
    seed: int,
    **shares: Any,
) -> None:
    """Remove what MODEL needs least.

    MODEL is a folder, a hub id or a .gguf file; a recipe can name the folder that is written. Removing layers, channels
    and heads makes the model faster on any hardware; zeros make it smaller on disk. The pruned model recovers by
    distillation from the unpruned one. An interrupted run continues when it is started again.
    """
    from edgemix.export.training.output_folder import check_output
    from edgemix.recipe.compression import Pruning, check_pruning

    pruning = Pruning(**shares)
    if not (pruning.layers or pruning.ffn or pruning.heads or pruning.zeros):
        raise click.UsageError("Nothing to cut: give --layers, --ffn, --heads, --sparsity or --pattern 2:4.")
    check_pruning(pruning)
    domains = read_files(texts, template)
    check_output(output)  # report mistakes before the slow import of torch
    with console.progress.stage("import torch"):
        from edgemix.export.pruning.prune import prune as run
        from edgemix.export.pruning.report import SPEED_NOTE

    report = run(model, output, domains, pruning, adapter=adapter, seed=seed, progress=console.progress)
    if console.as_json:
        import msgspec

        console.document({"output": output, "speed": SPEED_NOTE, **msgspec.to_builtins(report)})
        return
    console.table("Pruning", ("", ""), _report_rows(report), left=2)
    console.table(
        "Layers",
        ("", "Parameters\nbefore", "After", "Zeros", "Zeros\n(%)", "MB\nbefore", "MB\nafter"),
        [_row(part) for part in (*report.parts, report.total)],
    )
    if report.total.zeros:
        console.line(SPEED_NOTE)
    elif report.total.parameters_after == report.total.parameters_before:
        console.note(
            "Nothing was cut: sizes are rounded to multiples that kernels run fast, and these shares round to zero."
        )
    if report.over_limits:
        console.note("Over the limits of the parity gate: a recipe accepts this model, but its loss is high.")
    console.line(f"In a recipe: {{name: {output.name}, model: {output}}}")


def _report_rows(report: PruningReport) -> list[tuple[str, str]]:
    rows = []
    if report.before is not None and report.after is not None:
        sizes = [f"{s.layers} layers, {s.ffn} channels, {s.key_value_heads} key-value heads" for s in
                 (report.before, report.after)]  # fmt: skip
        rows.append(("Sizes", sizes[0] if sizes[0] == sizes[1] else f"{sizes[0]} before\n{sizes[1]} after"))
    figures = report.figures
    rows += [
        (
            "Parameters",
            f"{figures.parameters_before / 1e6:,.1f} M before, {figures.parameters_after / 1e6:,.1f} M after",
        ),
        ("Zeros", f"{100 * figures.sparsity:.1f}% of the linears' weights"),
        ("Recovery", f"{report.recovery_steps:,} steps, {report.recovery_seconds:.0f} s"),
        ("KL", f"{figures.kl:.4f} nats per token on {figures.tokens:,} held-out tokens (limit {figures.kl_limit:g})"),
        ("Perplexity", f"{figures.perplexity_ratio:.4f} times what it was (limit {figures.perplexity_ratio_limit:g})"),
    ]
    return rows


def _row(part: LayerReport) -> tuple[str, ...]:
    return (
        part.name,
        f"{part.parameters_before:,}",
        f"{part.parameters_after:,}",
        f"{part.zeros:,}",
        f"{100 * part.sparsity:.1f}",
        megabytes(part.bytes_before),
        megabytes(part.bytes_after),
    )
