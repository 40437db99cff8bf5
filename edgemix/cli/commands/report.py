"""`edgemix report`: write a bundle's report as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.loading import mixture_and_student
from edgemix.cli.options import bundle_argument, max_tokens_option, runtime_options, template_option, window_option
from edgemix.cli.outputs import check_output_file
from edgemix.cli.texts import read_files

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.results.evaluation import Evaluation, WeightTrace


@command(
    "report",
    example="edgemix report mixture\n"
    "edgemix report mixture wiki.txt code.txt --max-tokens 5000 -o report.html\n"
    "edgemix report mixture wiki.txt --profile profile.json",
    extra="report,cpu",
)
@bundle_argument
@click.argument("texts", metavar="[TEXT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page's file; an existing one is replaced.",
)
@click.option(
    "--profile",
    "profile_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A profile of this bundle, by `edgemix profile -o FILE`.",
)
@template_option
@window_option
@max_tokens_option
@click.option(
    "--text-tokens",
    metavar="N",
    type=click.IntRange(min=2, max=1000),
    default=256,
    show_default=True,
    help="Tokens of each text to show, in the color of the member with the largest weight.",
)
@click.option(
    "--no-speed", "speed", flag_value=False, default=True, help="Do not measure speed, which takes some seconds."
)
@runtime_options
def report(
    console: Console,
    *,
    bundle: Path,
    texts: tuple[Path, ...],
    output: Path,
    profile_file: Path | None,
    template: str | None,
    window: int,
    max_tokens: int | None,
    text_tokens: int,
    speed: bool,
    **loading: Any,
) -> None:
    """Write a report on BUNDLE: quality, speed, size and members.

    The report is one self-contained HTML file, without network or scripts. With TEXTS it shows quality against size and
    speed, bits per byte by text, and the members' weights along the texts; with a profile, latency distributions, the
    roofline, and time by operator and layer; without either, the bundle's contents. The page names missing inputs.
    """
    check_output_file(output)
    documents = read_files(texts, template) if texts or template else {}

    from edgemix.bundle.reader import read_manifest
    from edgemix.files import write_atomically
    from edgemix.report import build_report
    from edgemix.report.data import check_profile
    from edgemix.results.profile import read_profile

    manifest = read_manifest(bundle)
    profile = None if profile_file is None else read_profile(profile_file)
    if profile is not None:
        check_profile(profile)
    evaluation: Evaluation | None = None
    traces: tuple[WeightTrace, ...] = ()
    if documents:
        from edgemix.runtime.evaluation.evaluate import evaluate
        from edgemix.runtime.evaluation.weight_traces import trace_weights

        with mixture_and_student(bundle, **loading) as (mixture, student):
            evaluation = evaluate(
                mixture,
                documents,
                student=student,
                window=window,
                max_tokens=max_tokens,
                speed=speed and profile is None,
                progress=console.progress,
            )
            traces = trace_weights(mixture, documents, tokens=text_tokens, progress=console.progress)
    with console.progress.stage("draw"):
        page = build_report(bundle.resolve().name, manifest, evaluation=evaluation, traces=traces, profile=profile)
    write_atomically(output, page.html.encode())
    if console.as_json:
        console.document({"bundle": bundle, "report": output, "shown": page.shown, "missing": page.missing})
        return
    console.line(f"{output}: {len(page.shown)} figures, tables and texts")
    for line in page.missing:
        console.line(line)
