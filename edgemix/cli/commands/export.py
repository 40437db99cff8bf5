"""`edgemix export`: recipe in, bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemix.cli.command import command
from edgemix.cli.commands.bundle import show_manifest
from edgemix.cli.options import DURATION, SIZE

if TYPE_CHECKING:
    from edgemix.cli.console import Console


@command(
    "export",
    example="edgemix init recipe.yaml\nedgemix export recipe.yaml -o mixture\n"
    "edgemix export recipe.yaml -o mixture --budget 250MB --max-tpot 20ms",
    extra="export,cpu",
    kept="There is no new bundle, but finished stages are kept: run the same command to go on.",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", "bundle", type=click.Path(path_type=Path), required=True, help="The bundle's folder.")
@click.option("--force", is_flag=True, help="Let a parity gate pass that is over its limit; the bundle records it.")
@click.option(
    "--budget",
    "size",
    metavar="SIZE",
    type=SIZE,
    help="Choose formats, layer by layer, that lose least in a bundle of this size, like 250MB.",
)
@click.option(
    "--max-tpot",
    "seconds",
    metavar="TIME",
    type=DURATION,
    help="As --budget, for the time that the mixture takes for a token here, like 20ms.",
)
def export(
    console: Console, *, recipe: Path, bundle: Path, force: bool, size: float | None, seconds: float | None
) -> None:
    """Build the bundle that RECIPE describes.

    Members become quantised ONNX graphs, and every graph must pass its parity gate. A run that was stopped goes on
    where it was when it is started again.

    With --budget or --max-tpot, members that have no format of their own in RECIPE get fp16, int8, or int4 with the
    layers that need it at 8 bits, by what that costs the mixture. The whole folder counts.
    """
    from edgemix.recipe.load import load_recipe

    loaded = load_recipe(recipe)  # its mistakes shall not wait for torch
    with console.progress.stage("import torch"):
        from edgemix.export.budget.plan import Budget
        from edgemix.export.pipeline import export_bundle

    limited = size is not None or seconds is not None
    budget = Budget(None if size is None else int(size), seconds) if limited else None
    manifest = export_bundle(loaded, bundle, force=force, budget=budget, progress=console.progress)
    if console.as_json:
        import msgspec

        console.document({"bundle": bundle, **msgspec.to_builtins(manifest)})
        return
    show_manifest(console, bundle, manifest)
    console.line(f'Next: edgemix generate {bundle} "Once upon a time"')
