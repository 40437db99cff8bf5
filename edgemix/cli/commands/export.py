"""`edgemix export`: build a bundle from a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemix.cli.command import command
from edgemix.cli.commands.bundle import show_manifest
from edgemix.cli.options import DURATION, SIZE
from edgemix.cli.outputs import has_work

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
    from edgemix.recipe.load import load_recipe

    loaded = load_recipe(recipe)  # report mistakes before the slow import of torch
    with console.progress.stage("import torch"):
        from edgemix.export.budget.plan import ResourceBudget
        from edgemix.export.pipeline import export_bundle

    limited = size is not None or seconds is not None
    budget = ResourceBudget(None if size is None else int(size), seconds) if limited else None
    manifest = export_bundle(loaded, bundle, force=force, strict=strict, budget=budget, progress=console.progress)
    if console.as_json:
        import msgspec

        console.document({"bundle": bundle, **msgspec.to_builtins(manifest)})
        return
    show_manifest(console, bundle, manifest)
    console.line(f'Next: edgemix generate {shlex.quote(str(bundle))} "Once upon a time"')
