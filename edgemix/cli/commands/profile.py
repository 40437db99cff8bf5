"""`edgemix profile`: what a bundle costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import bundle_argument, runtime_options, weights_option
from edgemix.cli.outputs import check_output

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.results.profile import Profile
    from edgemix.runtime.profiling.profiler import Measured


@command(
    "profile",
    example="edgemix profile mixture\n"
    "edgemix profile mixture --quick -o before.json\n"
    "edgemix profile mixture --compare before.json --trace trace.json\n"
    "edgemix profile mixture --recommend --report report.html\n"
    "edgemix profile after.json --compare before.json",
    extra="cpu",
)
@bundle_argument
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the profile here, as JSON."
)
@click.option("--quick", is_flag=True, help="In half a minute instead of three: fewer sizes, fewer rounds.")
@click.option(
    "--recommend",
    is_flag=True,
    help="Measure every way to run the mixture here, and keep the best as this machine's plan.",
)
@click.option(
    "--compare", metavar="FILE", type=click.Path(path_type=Path), help="Show ratios to a profile that -o wrote."
)
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write a timeline for Perfetto or chrome://tracing here.",
)
@click.option(
    "--report",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write a page with all of it here; see `edgemix report`.",
)
@click.option("--file", metavar="FILE", type=click.Path(path_type=Path), help="Continue the text of this UTF-8 file.")
@weights_option
@runtime_options
def profile(
    console: Console,
    *,
    bundle: Path,
    output: Path | None,
    quick: bool,
    recommend: bool,
    compare: Path | None,
    trace: Path | None,
    report: Path | None,
    file: Path | None,
    weights: Any,
    provider: str,
    threads: int | None,
    verify: bool,
) -> None:
    """Measure what BUNDLE costs on this machine.

    Each member alone, the student alone, the mixture plainly and in fewer calls: time to first token by length of the
    prompt, time per token by length of the context, many texts at once, loading, memory, energy where the machine tells
    it. Then where the time goes, and how far it is from what the machine can do. What does not hold still is measured
    again, and marked with ~ where that did not help.

    In the place of BUNDLE a profile that -o wrote can be given: it is shown, and nothing is measured.
    """
    from edgemix.results.profile import encode_profile, read_profile

    other = read_profile(compare) if compare else None
    if bundle.is_file():
        if output or quick or recommend or trace or report or file or weights or threads:
            raise click.UsageError(
                f"{bundle} is a file, a profile to be shown: it goes with --compare and --json alone."
            )
        _show(console, read_profile(bundle), other)
        return
    for path in (output, trace, report):
        if path is not None:
            check_output(path)
    if report is not None:
        from edgemix.report import build_report
    measured = _measure(
        console,
        bundle,
        quick=quick,
        recommend=recommend,
        file=file,
        weights=weights,
        loading={"provider": provider, "threads": threads, "verify": verify},
    )
    from edgemix.bundle.reader import read_manifest
    from edgemix.files import write_atomically

    if output is not None:
        write_atomically(output, encode_profile(measured.profile))
    if trace is not None:
        write_atomically(trace, measured.trace.encode())
    if report is not None:
        page = build_report(bundle.resolve().name, read_manifest(bundle), profile=measured.profile)
        write_atomically(report, page.html.encode())
    _show(console, measured.profile, other)
    for plan in measured.plans:
        console.note(f"Mixture.load and the other commands run it so from now on, by the plan {plan}")


def _measure(
    console: Console,
    bundle: Path,
    *,
    quick: bool,
    recommend: bool,
    file: Path | None,
    weights: Any,
    loading: dict[str, Any],
) -> Measured:
    from edgemix.cli.texts import read_prompt

    text = read_prompt(None, file) if file else None

    from edgemix.runtime.profiling.profiler import Request
    from edgemix.runtime.profiling.profiler import profile as measure

    named = ",".join(f"{name}={share:g}" for name, share in weights.items()) if isinstance(weights, dict) else weights
    request = Request(
        bundle,
        weights=weights,
        weights_name=named or "",
        quick=quick,
        recommend=recommend,
        text=text,
        **loading,
    )
    return measure(request, console.progress)


def _show(console: Console, found: Profile, other: Profile | None) -> None:
    from edgemix.results.profile_comparison import compare_profiles

    comparison = compare_profiles(found, other) if other is not None else None
    if console.as_json:
        console.document(found if comparison is None else {"profile": found, "comparison": comparison})
        return
    from edgemix.cli.commands.profile_tables import show_comparison, show_profile

    show_profile(console, found)
    if comparison is not None:
        show_comparison(console, comparison)
