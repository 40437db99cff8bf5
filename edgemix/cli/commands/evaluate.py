"""`edgemix evaluate` and `edgemix fit-weights`: measure how well a bundle predicts texts, and fit its weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.commands.bundle import show_weights
from edgemix.cli.loading import mixture_and_student
from edgemix.cli.options import bundle_argument, max_tokens_option, runtime_options, template_option, window_option
from edgemix.cli.texts import read_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edgemix.cli.console import Console
    from edgemix.results.evaluation import Evaluation, Figures, Row

_files_argument = click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))


@command(
    "evaluate",
    example="edgemix evaluate mixture wikitext.txt code.txt\n"
    'edgemix evaluate mixture qa.jsonl --template "{question}\\n{answer}\\n" --json',
    extra="cpu",
)
@bundle_argument
@_files_argument
@template_option
@window_option
@max_tokens_option
@click.option(
    "--no-speed", "speed", flag_value=False, default=True, help="Do not measure speed, which takes some seconds."
)
@runtime_options
def evaluate(
    console: Console,
    *,
    bundle: Path,
    files: tuple[Path, ...],
    template: str | None,
    window: int,
    max_tokens: int | None,
    speed: bool,
    **loading: Any,
) -> None:
    """Measure how well BUNDLE predicts FILES.

    Shows bits per byte and perplexity (lower is better), with a row for each member, the uniform mixture, the mixture
    with the bundle's own weights, and the student, and a column for each file.

    Of a mixture over labels, FILES are .jsonl files of labeled examples; then it shows accuracy, F1, likelihood and
    calibration.

    Also shows how well each member and the student agree with the mixture: how often their most probable token is the
    same, and the share of their draft tokens that it would accept. Finally, the decoding speed on this machine.
    """
    from edgemix.bundle.manifest import Manifest
    from edgemix.bundle.reader import read_any_manifest

    if not isinstance(read_any_manifest(bundle), Manifest):
        from edgemix.cli.labels.evaluate import evaluate_labels

        evaluate_labels(console, bundle, files, speed=speed, **loading)
        return
    documents = read_files(files, template)

    from edgemix.runtime.evaluation.evaluate import evaluate as measure

    with mixture_and_student(bundle, **loading) as (mixture, student):
        evaluation = measure(
            mixture,
            documents,
            student=student,
            window=window,
            max_tokens=max_tokens,
            speed=speed,
            progress=console.progress,
        )
    if console.as_json:
        console.document({"bundle": bundle, "provider": mixture.provider, **asdict(evaluation)})
        return
    show_evaluation(console, evaluation)


def show_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print an evaluation: a table for each metric, with a row for each model and each mixture."""
    names = (*evaluation.rows[0].files, "all files")

    def figures(row: Row) -> tuple[Figures, ...]:
        return (*row.files.values(), row.overall)

    def metric(title: str, text: Callable[[Figures], str], rows: Iterable[Row] = evaluation.rows) -> None:
        console.table(title, ("", *names), [(row.name, *map(text, figures(row))) for row in rows])

    sizes = zip(names, figures(evaluation.rows[0]), strict=True)
    console.table("Files", ("", "Tokens", "Bytes"), [(name, f"{f.tokens:,}", f"{f.bytes:,}") for name, f in sizes])
    metric("Bits per byte", lambda figures: f"{figures.bits_per_byte:.4f}")
    metric("Perplexity (per token)", lambda figures: f"{figures.perplexity:,.2f}")
    models = [row for row in evaluation.rows if row.kind != "mixture"]
    if len(models) > 1:
        metric("Greedy agreement with the mixture (%)", lambda figures: _percent(figures.agreement), models)
        metric("Acceptance rate as the mixture's draft (%)", lambda figures: _percent(figures.acceptance), models)
    if any(row.decode_rate is not None for row in evaluation.rows):
        _show_speed(console, evaluation)
    if evaluation.default != evaluation.mixture:
        console.line(f"Generation uses {evaluation.default} weights unless --weights says otherwise.")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _show_speed(console: Console, evaluation: Evaluation) -> None:
    plain, generated = "plain loop", "as generated"
    rates = [(row.name, plain, row.decode_rate) for row in evaluation.rows if row.decode_rate is not None]
    mixture_rate = next(rate for name, _, rate in reversed(rates) if name == evaluation.mixture)
    rates += [(row.name, generated, row.generation_rate) for row in evaluation.rows if row.generation_rate is not None]
    console.table(
        "Decoding on this machine",
        ("", "", "Tokens/s", "Relative to the mixture's plain loop"),
        [(name, how, f"{rate:,.1f}", f"{rate / mixture_rate:.2f}") for name, how, rate in rates],
        left=2,
    )


@command(
    "fit-weights",
    example="edgemix fit-weights mixture math.txt code.txt\n"
    'edgemix fit-weights mixture qa.jsonl --template "{question}\\n{answer}\\n"',
    extra="cpu",
    on_interrupt="The bundle keeps its old weights.",
)
@bundle_argument
@_files_argument
@template_option
@window_option
@max_tokens_option
@click.option(
    "--adaptive/--fixed",
    default=None,
    show_default="adaptive for several files",
    help="Whether the weights adapt to the text that is generated, or stay fixed.",
)
@runtime_options
def fit_weights(
    console: Console,
    *,
    bundle: Path,
    files: tuple[Path, ...],
    template: str | None,
    window: int,
    max_tokens: int | None,
    adaptive: bool | None,
    **loading: Any,
) -> None:
    """Fit the mixture's weights to FILES.

    The weights in BUNDLE are replaced atomically. Each file is a domain, named after the file without its suffix:
    `--weights NAME` then uses the weights fitted to that file alone. Use text that no member was trained on, and keep
    other text for `edgemix evaluate`. Weights fitted to several files then adapt to the text that is generated, unless
    --fixed is given.
    """
    documents = read_files(files, template)

    import msgspec

    from edgemix.bundle.writer import check_writable, write_manifest
    from edgemix.export.stages.weights import choose_adaptive
    from edgemix.export.stages.weights import fit_weights as fit
    from edgemix.runtime import Mixture

    with Mixture.load(bundle, **loading) as mixture:
        check_writable(bundle)
        weights = fit(
            mixture, documents, window=min(window, mixture.context), max_tokens=max_tokens, progress=console.progress
        )
        weights = choose_adaptive(weights, {None: "fit", True: "adaptive", False: "fixed"}[adaptive])
        manifest = msgspec.structs.replace(mixture.manifest, weights=weights)
    write_manifest(bundle, manifest)
    if console.as_json:
        console.document({"bundle": bundle, "weights": weights})
        return
    show_weights(console, f"Weights of {bundle} (fit)", weights, mixture.members)
