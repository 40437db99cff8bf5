"""`edgemix evaluate` and `edgemix fit-weights`: how well a bundle predicts texts, and the weights that do it best."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemix.cli.bundle import show_weights
from edgemix.cli.command import command
from edgemix.cli.options import bundle_argument, max_tokens_option, runtime_options, template_option, window_option
from edgemix.cli.texts import read_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemix.cli.console import Console
    from edgemix.runtime.evaluation import Evaluation, Figures, Row

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
@runtime_options
def evaluate(
    console: Console,
    *,
    bundle: Path,
    files: tuple[Path, ...],
    template: str | None,
    window: int,
    max_tokens: int | None,
    provider: str,
    threads: int | None,
    verify: bool,
) -> None:
    """Measure how well BUNDLE predicts FILES.

    Shows bits per byte and perplexity, lower is better: a row for each member, the uniform mixture and the bundle's own
    weights; a column for each file, and all together.
    """
    documents = read_files(files, template)

    from edgemix.runtime import Mixture
    from edgemix.runtime.evaluation import evaluate as measure

    with Mixture.load(bundle, provider=provider, threads=threads, verify=verify) as mixture:
        evaluation = measure(
            mixture, documents, window=min(window, mixture.context), max_tokens=max_tokens, progress=console.progress
        )
    if console.as_json:
        console.document({"bundle": bundle, **asdict(evaluation)})
        return
    show_evaluation(console, evaluation)


def show_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print an evaluation: the files, then a table a measure with a line for each way to weigh the members."""
    names = (*evaluation.rows[0].files, "all files")

    def figures(row: Row) -> tuple[Figures, ...]:
        return (*row.files.values(), row.overall)

    def measure(title: str, shown: Callable[[Figures], str]) -> None:
        console.table(title, ("", *names), [(row.name, *map(shown, figures(row))) for row in evaluation.rows])

    sizes = zip(names, figures(evaluation.rows[0]), strict=True)
    console.table("Files", ("", "Tokens", "Bytes"), [(name, f"{f.tokens:,}", f"{f.bytes:,}") for name, f in sizes])
    measure("Bits per byte", lambda figures: f"{figures.bits_per_byte:.4f}")
    measure("Perplexity (of a token)", lambda figures: f"{figures.perplexity:,.2f}")


@command(
    "fit-weights",
    example="edgemix fit-weights mixture math.txt code.txt\n"
    'edgemix fit-weights mixture qa.jsonl --template "{question}\\n{answer}\\n"',
    extra="cpu",
    kept="The bundle keeps its old weights.",
)
@bundle_argument
@_files_argument
@template_option
@window_option
@max_tokens_option
@runtime_options
def fit_weights(
    console: Console,
    *,
    bundle: Path,
    files: tuple[Path, ...],
    template: str | None,
    window: int,
    max_tokens: int | None,
    provider: str,
    threads: int | None,
    verify: bool,
) -> None:
    """Fit the mixture's weights to FILES.

    BUNDLE gets them in one step: it has the old ones or the new ones, whatever happens. Each file is a domain, by its
    name without suffix: `--weights NAME` then uses the best weights for it alone. Use text that no member was trained
    on, and keep other text for `edgemix evaluate`.
    """
    documents = read_files(files, template)

    import msgspec

    from edgemix.bundle import write_manifest
    from edgemix.export.mixture_weights import fit_weights as fit
    from edgemix.runtime import Mixture

    with Mixture.load(bundle, provider=provider, threads=threads, verify=verify) as mixture:
        weights = fit(
            mixture, documents, window=min(window, mixture.context), max_tokens=max_tokens, progress=console.progress
        )
        manifest = msgspec.structs.replace(mixture.manifest, weights=weights)
    write_manifest(bundle, manifest)
    if console.as_json:
        console.document({"bundle": bundle, "weights": weights})
        return
    show_weights(console, f"Weights of {bundle} (fit)", weights, mixture.members)
