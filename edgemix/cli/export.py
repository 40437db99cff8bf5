"""`edgemix export`: recipe in, bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemix.cli.bundle import show_manifest
from edgemix.cli.command import command

if TYPE_CHECKING:
    from edgemix.cli.console import Console


@command(
    "export",
    example="edgemix init recipe.yaml\nedgemix export recipe.yaml -o mixture",
    extra="export,cpu",
    kept="There is no new bundle, but finished stages are kept: run the same command to go on.",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", "bundle", type=click.Path(path_type=Path), required=True, help="The bundle's folder.")
@click.option("--force", is_flag=True, help="Let a parity gate pass that is over its limit; the bundle records it.")
def export(console: Console, recipe: Path, bundle: Path, force: bool) -> None:
    """Build the bundle that RECIPE describes.

    Members become quantised ONNX graphs, and every graph must pass its parity gate. A run that was stopped goes on
    where it was when it is started again.
    """
    from edgemix.recipe import load_recipe

    loaded = load_recipe(recipe)  # its mistakes shall not wait for torch
    with console.progress.stage("import torch"):
        from edgemix.export.pipeline import export_bundle

    manifest = export_bundle(loaded, bundle, force=force, progress=console.progress)
    if console.as_json:
        import msgspec

        console.document({"bundle": bundle, **msgspec.to_builtins(manifest)})
        return
    show_manifest(console, bundle, manifest)
    console.line(f'Next: edgemix generate {bundle} "Once upon a time"')
