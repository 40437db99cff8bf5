"""`edgemix inspect` and `edgemix verify`: what a bundle holds, and whether it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.cli.command import command
from edgemix.cli.console import megabytes
from edgemix.cli.options import bundle_argument

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemix.bundle import Manifest, MemberEntry, Weights
    from edgemix.cli.console import Console


@command("inspect", example="edgemix inspect mixture")
@bundle_argument
def inspect(console: Console, bundle: Path) -> None:
    """Show what is in BUNDLE.

    Members, formats, sizes, sources, parity, weights. Reads the manifest only; `edgemix verify` reads every byte.
    """
    from edgemix.bundle import read_manifest

    manifest = read_manifest(bundle)
    if console.as_json:
        import msgspec

        size = sum(entry.size for entry in manifest.files.values())
        console.document({"bundle": bundle, "bytes": size, **msgspec.to_builtins(manifest)})
        return
    show_manifest(console, bundle, manifest)


@command("verify", example="edgemix verify mixture && echo whole")
@bundle_argument
def verify(console: Console, bundle: Path) -> None:
    """Check that BUNDLE is whole.

    Structure, schema, paths, the sha256 of every file, the tokenizer.
    """
    from edgemix.bundle import read_manifest, verify_bundle
    from edgemix.runtime.tokenizer import Tokenizer

    manifest = read_manifest(bundle)
    verify_bundle(bundle, manifest, progress=console.progress)
    Tokenizer.load(bundle, manifest.tokenizer)
    size = sum(entry.size for entry in manifest.files.values())
    if console.as_json:
        console.document({"bundle": bundle, "whole": True, "files": len(manifest.files), "bytes": size})
        return
    console.line(f"{bundle} is whole: {len(manifest.files)} files, {megabytes(size)} MB")


def show_manifest(console: Console, bundle: Path, manifest: Manifest) -> None:
    """Print a manifest as tables (`inspect`, and the summary of `export`)."""
    size = sum(entry.size for entry in manifest.files.values())
    console.table(
        f"{bundle}: {megabytes(size)} MB, for {manifest.target}, by edgemix {manifest.edgemix}",
        ("Member", "Format", "Graph", "MB", "Parameters (M)", "Context (tokens)"),
        [_facts(manifest, member) for member in manifest.members],
        left=3,
    )
    console.table("Sources", ("Member", "Model", "Type", "Licence"), [_source(m) for m in manifest.members], left=4)
    console.table(
        "Parity (largest difference to torch; then the stored graph against fp32)",
        ("Member", "Torch (nats)", "KL (nats)", "Flips (%)", "Perplexity ratio", "Forced"),
        [_parity(member) for member in manifest.members],
    )
    names = [member.name for member in manifest.members]
    show_weights(console, f"Weights ({manifest.weights.method})", manifest.weights, names)
    for member in manifest.members:
        for fallback in member.fallbacks:
            console.line(f"{member.name}: {fallback}")


def show_weights(console: Console, title: str, weights: Weights, members: Sequence[str]) -> None:
    """Print the default weights and each domain's, a line for each set."""
    rows = {"default": weights.default, **weights.domains}
    shares = [(name, *(f"{row[member]:.3f}" for member in members)) for name, row in rows.items()]
    console.table(title, ("Weights", *members), shares)


def _facts(manifest: Manifest, member: MemberEntry) -> tuple[str, ...]:
    folder = member.graph.rpartition("/")[0] + "/"
    size = sum(entry.size for name, entry in manifest.files.items() if name.startswith(folder))
    return (
        member.name,
        member.format,
        member.facts.exporter,
        megabytes(size),
        f"{member.source.parameters / 1e6:,.1f}",
        f"{member.facts.context:,}",
    )


def _source(member: MemberEntry) -> tuple[str, ...]:
    source = member.source
    model = f"{source.model} + {source.adapter}" if source.adapter else source.model
    return member.name, model, source.model_type, source.licence or "not stated"


def _parity(member: MemberEntry) -> tuple[str, ...]:
    worst = max(member.parity.prefill, member.parity.decode, member.parity.padded_batch)
    stored = member.quantization
    figures = (
        ("", "", "")
        if stored is None
        else (f"{stored.kl:.4f}", f"{100 * stored.flips:.2f}", f"{stored.perplexity_ratio:.4f}")
    )
    return member.name, f"{worst:.1e}", *figures, "yes" if member.forced else "no"
