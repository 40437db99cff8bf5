"""The manifest of a bundle over labels, as `inspect` and `export` print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.cli.console import megabytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemix.bundle.label_bundle.manifest import EncoderMember, LabelManifest, LabelMember
    from edgemix.cli.console import Console

_MOST_LABELS = 20


def show_label_manifest(console: Console, bundle: Path, manifest: LabelManifest) -> None:
    """Print a manifest as tables."""
    from edgemix.bundle.label_bundle.manifest import EncoderMember

    size = sum(entry.size for entry in manifest.files.values())
    console.table(
        f"{bundle}: {manifest.task}, {megabytes(size)} MB, for {manifest.target}, by edgemix {manifest.edgemix}",
        ("Member", "Kind", "Format", "MB", "Parameters (M)", "Tokens", "Temperature"),
        [_member_row(manifest, member) for member in manifest.members],
        left=3,
    )
    if encoders := [member for member in manifest.members if isinstance(member, EncoderMember)]:
        _show_encoders(console, encoders)
    labels = ", ".join(manifest.labels[:_MOST_LABELS])
    more = f", and {len(manifest.labels) - _MOST_LABELS} more" if len(manifest.labels) > _MOST_LABELS else ""
    several = "; an example may have several" if manifest.multi_label else ""
    console.line(f"Labels: {labels or 'the tokens of the vocabulary'}{more}{several}.")
    for member in manifest.members:
        if unknown := [label for label in manifest.labels if label not in member.labels]:
            console.line(f"{member.name} does not know {', '.join(unknown[:_MOST_LABELS])}.")
    names, weights = [member.name for member in manifest.members], manifest.weights
    shares = {"default": weights.default, **weights.domains}
    console.table(
        f"Weights ({weights.method}), {manifest.combine}",
        ("Weights", *names),
        [(name, *(f"{row[member]:.3f}" for member in names)) for name, row in shares.items()],
    )


def _show_encoders(console: Console, encoders: Sequence[EncoderMember]) -> None:
    """Print where the members that are models come from, and how close they stayed."""
    console.table(
        "Sources",
        ("Member", "Model", "Type", "License"),
        [
            (each.name, each.source.model, each.source.model_type, each.source.license or "not stated")
            for each in encoders
        ],
        left=4,
    )
    rows = []
    for each in encoders:
        stored, worst = each.quantization, max(each.parity.single, each.parity.padded)
        kl = "" if stored is None else f"{stored.kl:.4f}"
        changed = "" if stored is None else f"{100 * stored.disagreement:.2f}"
        both = "" if stored is None or stored.metric_fp32 is None else f"{100 * stored.metric_fp32:.2f}"
        after = "" if stored is None or stored.metric_stored is None else f"{100 * stored.metric_stored:.2f}"
        rows.append((each.name, f"{worst:.1e}", kl, changed, both, after, "yes" if each.forced else "no"))
    console.table(
        "Parity (largest difference from PyTorch; then the stored graph against fp32)",
        ("Member", "Torch\n(nats)", "KL\n(nats)", "Changed\n(%)", "Accuracy\nfp32 (%)", "Stored\n(%)", "Forced"),
        rows,
    )


def _member_row(manifest: LabelManifest, member: LabelMember) -> tuple[str, ...]:
    from edgemix.bundle.label_bundle.manifest import EncoderMember, member_folder

    folder = f"{member_folder(member.name)}/"
    size = megabytes(sum(entry.size for name, entry in manifest.files.items() if name.startswith(folder)))
    temperature = f"{member.temperature:.2f}"
    if not isinstance(member, EncoderMember):
        return member.name, "rules", f"{member.entries:,} entries", size, "", "", temperature
    parameters = f"{member.source.parameters / 1e6:,.1f}"
    return member.name, "model", member.format, size, parameters, f"{member.tokenizer.max_length:,}", temperature
