"""`edgemix profile`: measure a bundle's latency, memory and energy on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import bundle_argument, runtime_options, weights_option
from edgemix.cli.outputs import check_output_file

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.results.profile import Profile
    from edgemix.runtime.profiling.profiler import MeasuredProfile


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
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the profile as JSON.")
@click.option("--quick", is_flag=True, help="Half a minute instead of three: fewer sizes and repetitions.")
@click.option(
    "--recommend",
    is_flag=True,
    help="Measure all configurations of the mixture, and save the fastest as this machine's plan.",
)
@click.option(
    "--compare", metavar="FILE", type=click.Path(path_type=Path), help="Compare with a profile that -o wrote."
)
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write a trace for Perfetto or chrome://tracing.",
)
@click.option(
    "--report",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the profile as an HTML page; see `edgemix report`.",
)
@click.option(
    "--file", metavar="FILE", type=click.Path(path_type=Path), help="Use the text of this UTF-8 file as prompts."
)
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
    **loading: Any,
) -> None:
    """Measure BUNDLE's speed and memory on this machine.

    Profiles each member alone, the student alone, and the mixture with the plain loop and with speculative decoding:
    time to first token by prompt length, time per output token by context length, throughput by batch size, loading
    time, memory, and energy if the machine has a counter. Also shows time by operator and layer, and the roofline.
    Measurements that are not stable are repeated, and marked with ~ if they remain so.

    BUNDLE can also be a profile that -o wrote: it is shown, and nothing is measured.
    """
    from edgemix.results.profile import encode_profile, read_profile

    other = read_profile(compare) if compare else None
    if bundle.is_file():
        if output or quick or recommend or trace or report or file or weights or loading["threads"]:
            raise click.UsageError(
                f"{bundle} is a file: a saved profile can only be combined with --compare and --json."
            )
        _show(console, read_profile(bundle), other)
        return
    for path in (output, trace, report):
        if path is not None:
            check_output_file(path)
    if report is not None:
        from edgemix.report import build_report
    measured = _measure(
        console,
        bundle,
        quick=quick,
        recommend=recommend,
        file=file,
        weights=weights,
        **loading,
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
        console.note(f"Mixture.load and all commands now run the bundle by the plan {plan}")


def _measure(
    console: Console,
    bundle: Path,
    *,
    quick: bool,
    recommend: bool,
    file: Path | None,
    weights: Any,
    **loading: Any,
) -> MeasuredProfile:
    from edgemix.cli.texts import read_prompt

    text = read_prompt(None, file) if file else None

    from edgemix.runtime.profiling.profiler import ProfileRequest
    from edgemix.runtime.profiling.profiler import profile as measure

    named = ",".join(f"{name}={share:g}" for name, share in weights.items()) if isinstance(weights, dict) else weights
    request = ProfileRequest(
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
