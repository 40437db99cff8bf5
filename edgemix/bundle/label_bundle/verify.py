"""Check the files of a bundle over labels against its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.bundle.verify import check_checksums, check_files, check_graph, check_tokenizer
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.bundle.label_bundle.manifest import LabelManifest


def verify_label_bundle(
    bundle: Path, manifest: LabelManifest, *, checksums: bool = True, progress: Progress = NO_PROGRESS
) -> None:
    """Check a bundle's files against its manifest.

    Args:
        bundle: The folder that `manifest` was read from.
        manifest: From `read_any_manifest`.
        checksums: Read every file and compare its sha256, and the tokenizers' fingerprints. Without it: sizes, paths,
            and that the graphs are safe and their weights listed.
        progress: Progress callback.

    Raises:
        BundleError: A file is missing, changed, not listed though it could be loaded, or outside the bundle.
    """
    check_files(bundle, manifest)
    if checksums:
        check_checksums(bundle, manifest, progress)
        for member in manifest.encoders:
            check_tokenizer(bundle, member.tokenizer.path, member.tokenizer.sha256)
    for graph in manifest.graph_paths:
        check_graph(bundle, manifest, graph)
