"""Check the files of a bundle against its manifest."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from edgemix.bundle.graph_safety import verify_graph
from edgemix.bundle.manifest import (
    MANIFEST,
    TOKENIZER,
    BundleManifest,
    Manifest,
    MemberEntry,
)
from edgemix.bundle.paths import resolve
from edgemix.bundle.reader import check_sizes, draft_tokens, ngram_table
from edgemix.bundle.sparse_storage import SUFFIX, read_header
from edgemix.bundle.tokenizer_identity import TokenizerIdentity
from edgemix.errors import EXPORT_AGAIN, BundleError, InputError
from edgemix.files import files_in, hash_file
from edgemix.progress import NO_PROGRESS, Progress

# Files that ONNX Runtime or a tokenizer would open if something led there; others (a README, .DS_Store) are harmless.
_LOADABLE = frozenset({".onnx", ".data", SUFFIX, ".json", ".jinja"})


def verify_any_bundle(
    bundle: Path, manifest: BundleManifest, *, checksums: bool = True, progress: Progress = NO_PROGRESS
) -> None:
    """Check the files of a bundle of any task against its manifest; see `verify_bundle`."""
    if isinstance(manifest, Manifest):
        verify_bundle(bundle, manifest, checksums=checksums, progress=progress)
        return
    from edgemix.bundle.label_bundle.manifest import LabelManifest
    from edgemix.bundle.label_bundle.verify import verify_label_bundle

    if isinstance(manifest, LabelManifest):
        verify_label_bundle(bundle, manifest, checksums=checksums, progress=progress)


def verify_bundle(
    bundle: Path,
    manifest: Manifest,
    *,
    checksums: bool = True,
    only: MemberEntry | None = None,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Check the bundle's files against its manifest, and that its lists of token ids are valid.

    Args:
        bundle: The folder that `manifest` was read from.
        manifest: From `read_manifest`.
        checksums: Read every file and compare its sha256, and the tokenizer's fingerprint. Without it: sizes, paths,
            and that the graphs' external data is listed and lies within its files.
        only: The graph that will be opened, where it is one alone; the others' files are not read.
        progress: Progress callback.

    Raises:
        BundleError: A file is missing, changed, not listed though it could be loaded, or outside the bundle.
    """
    check_files(bundle, manifest)
    entries = manifest.graphs if only is None else (only,)
    if checksums:
        others = tuple(f"{PurePosixPath(entry.graph).parent}/" for entry in manifest.graphs if entry not in entries)
        check_checksums(bundle, manifest, progress, without=others)
        check_tokenizer(bundle, TOKENIZER, manifest.tokenizer.sha256)
    graphs = {graph: member for member in entries for graph in member.paths}  # members may share one
    for graph, member in graphs.items():
        _check_weights(bundle, manifest, member, graph)
    for member in entries:
        if member.draft is not None:
            draft_tokens(bundle, manifest, member.draft)
    ngram_table(bundle, manifest)


def check_files(bundle: Path, manifest: BundleManifest) -> None:
    """Raise a BundleError unless all listed files are there in their sizes, and no others that could be loaded."""
    check_sizes(bundle, manifest)
    _check_unlisted(bundle, manifest)


def check_checksums(
    bundle: Path, manifest: BundleManifest, progress: Progress, *, without: tuple[str, ...] = ()
) -> None:
    """Raise a BundleError unless every listed file has its sha256; those in the folders `without` are not read."""
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(without)}
    with progress.stage("verify checksums", sum(entry.size for entry in files.values())) as task:
        for name, entry in files.items():
            if hash_file(resolve(bundle, name), task) != entry:
                raise BundleError(f"{bundle}: {name} has changed: its sha256 is not the manifest's", EXPORT_AGAIN)


def check_graph(bundle: Path, manifest: BundleManifest, graph: str) -> list[str]:
    """Check a graph, and that the files are listed that it takes weights from.

    Returns:
        The names of these files, beside the graph.

    Raises:
        BundleError: The graph is unsafe, or one is not listed.
    """
    folder = PurePosixPath(graph).parent
    locations = sorted(verify_graph(resolve(bundle, graph)))
    for location in locations:
        if str(folder / location) not in manifest.files:
            raise BundleError(f"{bundle}: {graph} takes weights from {location!r}, which is not listed")
    return locations


def _check_weights(bundle: Path, manifest: Manifest, member: MemberEntry, graph: str) -> None:
    """Check a member's graph, that its weights are listed, and stored without their zeros if the manifest says so."""
    folder, locations = PurePosixPath(graph).parent, check_graph(bundle, manifest, graph)
    sparse = [resolve(bundle, str(folder / location)) for location in locations if location.endswith(SUFFIX)]
    found = sum(read_header(path).size for path in sparse)
    if found != (member.sparse.size if member.sparse else 0):
        raise BundleError(f"{bundle}: the weights of {member.name!r} are not stored as {MANIFEST} says", EXPORT_AGAIN)


def check_tokenizer(bundle: Path, path: str, sha256: str) -> None:
    """Raise a BundleError unless a tokenizer has the fingerprint that the manifest states."""
    try:
        fingerprint = TokenizerIdentity.parse(resolve(bundle, path).read_bytes()).sha256()
    except InputError as error:
        raise BundleError(f"{bundle}: {path} is {error.message}", EXPORT_AGAIN) from None
    if fingerprint != sha256:
        raise BundleError(f"{bundle}: {path} is not the tokenizer that the members were exported with", EXPORT_AGAIN)


def _check_unlisted(bundle: Path, manifest: BundleManifest) -> None:
    for path in files_in(bundle):
        name = path.relative_to(bundle).as_posix()
        if name not in manifest.files and name != MANIFEST and path.suffix in _LOADABLE:
            raise BundleError(f"{bundle}: {name} is not listed in {MANIFEST}", "Remove it if you know what it is.")
