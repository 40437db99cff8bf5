"""`edgemix distill`: distill a mixture into a student, saved as a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemix.cli.command import command
from edgemix.cli.options import training_limit_options
from edgemix.cli.outputs import has_work

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.export.distillation.report import DistillationReport


@command(
    "distill",
    example="edgemix distill recipe.yaml -o student --minutes 45\n"
    "accelerate launch -m edgemix distill recipe.yaml -o student",
    extra="export,cpu",
    on_interrupt="The teacher's distributions and the steps so far are kept: run the same command to go on.",
    work=lambda arguments: has_work(arguments["student"]),
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", "student", type=click.Path(path_type=Path), required=True, help="The student's folder.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    show_default="the recipe's members, in torch",
    help="The teacher: the mixture of this bundle, with its weights.",
)
@training_limit_options(steps="the recipe's", minutes="the recipe's, with the teacher's part")
def distill(
    console: Console, *, recipe: Path, student: Path, bundle: Path | None, minutes: float | None, steps: int | None
) -> None:
    """Distill the mixture that RECIPE describes into its student.

    The student's layers are taken from the members; it learns the mixture's next-token distributions on the recipe's
    training text. An interrupted run continues when it is started again.
    """
    import msgspec

    from edgemix.export.training.output_folder import check_output
    from edgemix.recipe.compression import Student
    from edgemix.recipe.load import load_recipe

    loaded = load_recipe(recipe)  # report mistakes before the slow import of torch
    check_output(student)
    given = {name: value for name, value in (("minutes", minutes), ("steps", steps)) if value is not None}
    wanted = msgspec.structs.replace(loaded.student or Student(), **given)
    with console.progress.stage("import torch"):
        from edgemix.export.distillation.distill import distill as run_distillation

    changed = msgspec.structs.replace(loaded, student=wanted)
    report = run_distillation(changed, student, bundle=bundle, progress=console.progress)
    if os.environ.get("RANK", "0") != "0":  # only the first process that accelerate launches prints
        return
    if console.as_json:
        console.document({"student": student, **msgspec.to_builtins(report)})
        return
    console.table("Distillation", ("", ""), _report_rows(student, report), left=2)


def _report_rows(student: Path, report: DistillationReport) -> list[tuple[str, str]]:
    rows = [("Student", f"{student}: {report.layers} layers, {report.parameters / 1e6:.1f} M parameters")]
    if report.decoding is not None:
        rows.append(("Decoding", f"about {report.decoding:.0%} of a member's time"))
    shares = ", ".join(f"{name} {share:.3f}" for name, share in report.weights.items())
    rows += [
        ("Mixture", shares),
        ("Teacher", f"{report.teacher_tokens:,} tokens, {report.teacher_seconds:.0f} s"),
        ("Work", f"{report.steps:,} steps, {report.tokens:,} tokens, {report.seconds:.0f} s"),
        ("Training loss", f"{report.training_loss:.4f}"),
    ]
    if report.held_out_before is not None and report.held_out is not None:
        rows.append(("Held-out loss", f"{report.held_out_before:.4f} before, {report.held_out:.4f} after"))
    return rows
