"""`edgemix inspect` and `edgemix verify`: show a bundle's contents, and check that they are intact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.cli.command import command
from edgemix.cli.console import megabytes
from edgemix.cli.options import bundle_argument
from edgemix.formats import FORMAT_SPECS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemix.bundle.label_bundle.manifest import LabelManifest
    from edgemix.bundle.manifest import (
        BudgetFigures,
        Manifest,
        MemberEntry,
        MixtureParity,
        PruningFigures,
        QuantizationParity,
        Weights,
    )
    from edgemix.cli.console import Console


@command("inspect", example="edgemix inspect mixture")
@bundle_argument
def inspect(console: Console, bundle: Path) -> None:
    """Show the contents of BUNDLE.

    Lists members, formats, sizes, sources, parity and weights. Reads only the manifest; `edgemix verify` checks every
    file.
    """
    from edgemix.bundle.reader import read_any_manifest

    manifest = read_any_manifest(bundle)
    if console.as_json:
        import msgspec

        size = sum(entry.size for entry in manifest.files.values())
        console.document({"bundle": bundle, "bytes": size, **msgspec.to_builtins(manifest)})
        return
    show_any_manifest(console, bundle, manifest)


@command("verify", example="edgemix verify mixture && echo intact")
@bundle_argument
def verify(console: Console, bundle: Path) -> None:
    """Check that BUNDLE is intact.

    Checks structure, schema, paths, the SHA-256 of every file, and the tokenizer.
    """
    from edgemix.bundle.manifest import Manifest
    from edgemix.bundle.reader import read_any_manifest
    from edgemix.bundle.verify import verify_any_bundle

    manifest = read_any_manifest(bundle)
    verify_any_bundle(bundle, manifest, progress=console.progress)
    if isinstance(manifest, Manifest):
        from edgemix.runtime.text.tokenizer import Tokenizer

        Tokenizer.load(bundle, manifest.tokenizer)
    size = sum(entry.size for entry in manifest.files.values())
    if console.as_json:
        console.document({"bundle": bundle, "whole": True, "files": len(manifest.files), "bytes": size})
        return
    console.line(f"{bundle} is intact: {len(manifest.files)} files, {megabytes(size)} MB")


def show_any_manifest(console: Console, bundle: Path, manifest: Manifest | LabelManifest) -> None:
    """Print the manifest of a bundle of any task."""
    from edgemix.bundle.manifest import Manifest

    if isinstance(manifest, Manifest):
        show_manifest(console, bundle, manifest)
        return
    from edgemix.cli.labels.manifest import show_label_manifest

    show_label_manifest(console, bundle, manifest)


def show_manifest(console: Console, bundle: Path, manifest: Manifest) -> None:
    """Print a manifest as tables, for `inspect` and `export`."""
    size = sum(entry.size for entry in manifest.files.values())
    console.table(
        f"{bundle}: {megabytes(size)} MB, for {manifest.target}, by edgemix {manifest.edgemix}",
        ("Member", "Format", "Graph", "MB", "Parameters (M)", "Context (tokens)"),
        [_member_row(manifest, entry) for entry in manifest.graphs],
        left=3,
    )
    sources = [_source_row(entry) for entry in manifest.graphs]
    console.table("Sources", ("Member", "Model", "Type", "License"), sources, left=4)
    rows = [_parity_row(entry) for entry in manifest.graphs]
    mixed = manifest.quantization
    if mixed is not None:
        rows.append(("mixture", "", *_distances(mixed, ""), ""))
    console.table(
        "Parity (largest difference from PyTorch; then the stored graph against fp32)",
        (
            "Member",
            "Torch\n(nats)",
            "KL\n(nats)",
            "KL decoding\n(nats)",
            "Top-1\nchanged\n(%)",
            "Perplexity\nratio",
            "Forced",
        ),
        rows,
    )
    if pruned := [(entry.name, entry.pruning) for entry in manifest.graphs if entry.pruning is not None]:
        console.table(
            "Pruning (against the unpruned model)",
            ("Member", "Parameters\nbefore (M)", "After\n(M)", "Zeros\n(%)", "KL\n(nats)", "Perplexity\nratio"),
            [_pruning_row(name, figures) for name, figures in pruned],
        )
    names = [member.name for member in manifest.members]
    show_weights(console, f"Weights ({manifest.weights.method})", manifest.weights, names)
    if manifest.budget is not None:
        _show_budget(console, manifest, manifest.budget)
    if mixed is not None and mixed.weights != manifest.weights.default:
        shares = ", ".join(f"{name} {mixed.weights[name]:.3f}" for name in names)
        console.line(f"The mixture's parity was measured with other weights: {shares}")
    if manifest.ngrams:
        console.line(f"Draft model: {manifest.ngrams:,} n-grams of the training text")
    for entry in manifest.graphs:
        if entry.draft is not None:
            console.line(f"{entry.name}: drafts {entry.draft.vocabulary:,} of {entry.config.vocabulary:,} tokens")
        for fallback in entry.fallbacks:
            console.line(f"{entry.name}: {fallback}")


def show_weights(console: Console, title: str, weights: Weights, members: Sequence[str]) -> None:
    """Print the default weights and each domain's weights, a row for each."""
    rows = {"default": weights.default, **weights.domains}
    shares = [(name, *(f"{row[member]:.3f}" for member in members)) for name, row in rows.items()]
    console.table(title, ("Weights", *members), shares)
    console.line(f"By default, weights {'follow the text (adaptive)' if weights.adaptive else 'are fixed'}.")


def _show_budget(console: Console, manifest: Manifest, budget: BudgetFigures) -> None:
    """Print the formats that were chosen within a budget, and the losses at other budgets."""
    rows: list[tuple[str, ...]] = [
        (entry.name, entry.format, _share(entry), megabytes(_bytes(manifest, entry)), f"{loss:.5f}")
        for entry in manifest.members
        if (loss := budget.losses.get(entry.name)) is not None
    ]
    chosen, limits = budget.chosen, []
    rows.append(("mixture, whole bundle", "", "", megabytes(chosen.bytes), f"{chosen.loss:.5f}"))
    console.table("Budget", ("Member", "Format", "8-bit layers\n(%)", "MB", "Estimated KL\n(nats)"), rows, left=2)
    if budget.bytes is not None:
        limits.append(f"{megabytes(budget.bytes)} MB")
    if budget.seconds is not None:
        measured = "" if budget.measured is None else f", measured {_milliseconds(budget.measured)}"
        limits.append(
            f"{_milliseconds(budget.seconds)} ms per token (planned {_milliseconds(chosen.seconds)}{measured})"
        )
    console.line(f"Limits: {', '.join(limits)}\n")
    curve = [
        (megabytes(point.bytes), _milliseconds(point.seconds), f"{point.loss:.5f}", "chosen" if point == chosen else "")
        for point in budget.curve
    ]
    console.table("Loss at other budgets", ("MB", "ms per token", "Estimated KL\n(nats)", ""), curve, left=0)


def _share(entry: MemberEntry) -> str:
    return f"{100 * entry.eight_bits:.0f}" if FORMAT_SPECS[entry.format].mixed_bits else ""


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.2f}"


def _member_row(manifest: Manifest, member: MemberEntry) -> tuple[str, ...]:
    return (
        member.name,
        member.format,
        member.config.exporter,
        megabytes(_bytes(manifest, member)),
        f"{member.source.parameters / 1e6:,.1f}",
        f"{member.config.context:,}",
    )


def _bytes(manifest: Manifest, member: MemberEntry) -> int:
    """Return the bytes of a member's graph on disk."""
    folder = member.graph.rpartition("/")[0] + "/"
    return sum(entry.size for name, entry in manifest.files.items() if name.startswith(folder))


def _source_row(member: MemberEntry) -> tuple[str, ...]:
    source = member.source
    model = f"{source.model} + {source.adapter}" if source.adapter else source.model
    return member.name, model, source.model_type, source.license or "not stated"


def _parity_row(member: MemberEntry) -> tuple[str, ...]:
    worst = max(member.parity.prefill, member.parity.decode, member.parity.padded_batch)
    stored = member.quantization
    decoding = "" if stored is None or stored.decode_kl is None else f"{stored.decode_kl:.4f}"
    forced = "yes" if member.forced else "no"
    return member.name, f"{worst:.1e}", *_distances(stored, decoding), forced


def _pruning_row(name: str, figures: PruningFigures) -> tuple[str, ...]:
    return (
        name,
        f"{figures.parameters_before / 1e6:,.1f}",
        f"{figures.parameters_after / 1e6:,.1f}",
        f"{100 * figures.sparsity:.1f}",
        f"{figures.kl:.4f}",
        f"{figures.perplexity_ratio:.4f}",
    )


def _distances(stored: QuantizationParity | MixtureParity | None, decoding: str) -> tuple[str, ...]:
    if stored is None:
        return "", "", "", ""
    return f"{stored.kl:.4f}", decoding, f"{100 * stored.top1_disagreement:.2f}", f"{stored.perplexity_ratio:.4f}"
