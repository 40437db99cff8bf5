"""`edgemix export`: build a bundle from a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.commands.bundle import show_any_manifest
from edgemix.cli.options import DURATION, SIZE
from edgemix.cli.outputs import has_work
from edgemix.tasks import DEFAULT_TASK

if TYPE_CHECKING:
    from edgemix.cli.console import Console


@command(
    "export",
    example="edgemix init recipe.yaml\nedgemix export recipe.yaml -o mixture\n"
    "edgemix export recipe.yaml -o mixture --budget 250MB --max-tpot 20ms",
    extra="export,cpu",
    on_interrupt="No bundle was written, but finished stages are kept: run the same command to go on.",
    work=lambda arguments: has_work(arguments["bundle"]),
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", "bundle", type=click.Path(path_type=Path), required=True, help="The bundle's folder.")
@click.option("--force", is_flag=True, help="Export even if a parity gate fails; the bundle records it.")
@click.option("--strict", is_flag=True, help="Stop at what libraries warn about while they read the members.")
@click.option(
    "--budget",
    "size",
    metavar="SIZE",
    type=SIZE,
    help="Choose the formats with the least loss for a bundle of at most SIZE, like 250MB.",
)
@click.option(
    "--max-tpot",
    "seconds",
    metavar="TIME",
    type=DURATION,
    help="Choose the formats with the least loss for at most TIME per output token here, like 20ms.",
)
def export(
    console: Console,
    *,
    recipe: Path,
    bundle: Path,
    force: bool,
    strict: bool,
    size: float | None,
    seconds: float | None,
) -> None:
    """Build the bundle that RECIPE describes.

    Members become quantized ONNX graphs, and every graph must pass its parity gate. An interrupted run continues when
    it is started again.

    With --budget or --max-tpot, each member without a format in RECIPE gets fp16, int8, or int4 with its sensitive
    layers at 8 bits, whichever loses least in the mixture. SIZE is that of the whole bundle.
    """
    from edgemix.recipe.load import load_any_recipe
    from edgemix.recipe.schema import Recipe
    from edgemix.tasks import TASKS

    loaded = load_any_recipe(recipe)  # report mistakes before the slow import of torch
    limited = size is not None or seconds is not None
    options: dict[str, Any] = {}
    task = TASKS[DEFAULT_TASK if isinstance(loaded, Recipe) else loaded.task]
    if limited and not isinstance(loaded, Recipe):
        raise click.UsageError(f"--budget and --max-tpot choose formats of {DEFAULT_TASK}, not of {task.name}.")
    with console.progress.stage("import torch"):
        build = task.load("export")
        if limited:
            from edgemix.export.budget.plan import ResourceBudget

            options["budget"] = ResourceBudget(None if size is None else int(size), seconds)
    manifest = build(loaded, bundle, force=force, strict=strict, progress=console.progress, **options)
    if console.as_json:
        import msgspec

        console.document({"bundle": bundle, **msgspec.to_builtins(manifest)})
        return
    show_any_manifest(console, bundle, manifest)
    text = '"Once upon a time"' if isinstance(loaded, Recipe) else '"A text"'
    command_name = "generate" if isinstance(loaded, Recipe) else "predict"
    console.line(f"Next: edgemix {command_name} {shlex.quote(str(bundle))} {text}")
