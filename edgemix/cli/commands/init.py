"""`edgemix init`: write a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemix.cli.command import command

if TYPE_CHECKING:
    from edgemix.cli.console import Console


@command("init", example="edgemix init recipe.yaml\nedgemix export recipe.yaml -o mixture")
@click.argument("file", type=click.Path(path_type=Path), default=Path("recipe.yaml"))
@click.option(
    "--model",
    "models",
    metavar="MODEL",
    multiple=True,
    help="A member: a folder, hub id or .gguf file; may be repeated.",
)
def init(console: Console, file: Path, models: tuple[str, ...]) -> None:
    """Write a commented recipe to FILE.

    FILE is recipe.yaml unless given; an existing file is never overwritten.
    """
    from edgemix.errors import InputError, storage_errors
    from edgemix.recipe.template import template

    with storage_errors(f"writing {file}"):
        try:
            with file.open("x", encoding="utf-8") as output:
                output.write(template(*models))
        except FileExistsError:
            raise InputError(f"{file} exists already", "Give another name: edgemix init OTHER.yaml") from None
    if console.as_json:
        console.document({"recipe": file})
        return
    console.line(f"Wrote {file}. Edit it, then: edgemix export {file} -o mixture")
