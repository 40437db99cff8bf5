"""Reading, checking and writing a bundle: what can be known of it without running it.

Nothing that a manifest says is believed before it is checked, so that a damaged or hostile bundle is refused before
any memory is allocated by its numbers or any file outside it is opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from edgemix.errors import EXPORT_AGAIN, BundleError, EdgemixError, InputError, storage_errors
from edgemix.external_data import external_files
from edgemix.manifest import (
    CHAT_TEMPLATE,
    MANIFEST,
    NGRAMS,
    SCHEMA,
    TOKENIZER,
    BudgetFigures,
    BudgetPoint,
    DraftGraph,
    FileEntry,
    GraphParity,
    Manifest,
    MemberEntry,
    MixtureParity,
    PruningFigures,
    QuantizationParity,
    Source,
    SparseWeights,
    TokenizerEntry,
    Weights,
    checksum_of,
)
from edgemix.manifest_faults import faults
from edgemix.progress import SILENT, Progress, Task
from edgemix.safe_paths import resolve
from edgemix.sparse_storage import SUFFIX, read_header
from edgemix.tokenizer_identity import TokenizerIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemix.ngram_table import NgramTable

__all__ = [
    "CHAT_TEMPLATE",
    "MANIFEST",
    "NGRAMS",
    "SCHEMA",
    "TOKENIZER",
    "BudgetFigures",
    "BudgetPoint",
    "DraftGraph",
    "FileEntry",
    "GraphParity",
    "Manifest",
    "MemberEntry",
    "MixtureParity",
    "PruningFigures",
    "QuantizationParity",
    "Source",
    "SparseWeights",
    "TokenizerEntry",
    "Weights",
    "check_writable",
    "draft_tokens",
    "files_in",
    "hash_file",
    "ngram_table",
    "read_manifest",
    "resolve",
    "sync_folder",
    "verify_bundle",
    "write_atomically",
    "write_manifest",
]

MAX_MANIFEST_BYTES = 16 << 20
_LONGEST_TOKEN = 16
"""Most characters of a token's id in JSON, and what stands around it."""
_CHUNK = 1 << 20
_MOST_LINES, _LONGEST_LINE = 20, 300  # of what is said about a manifest that may be hostile
# Files that ONNX Runtime or a tokenizer would open if something led there; others (a README, .DS_Store) harm nobody.
_LOADABLE = frozenset({".onnx", ".data", SUFFIX, ".json", ".jinja"})


class _Header(msgspec.Struct):
    """What every version of the manifest has."""

    schema: int


def read_manifest(bundle: Path) -> Manifest:
    """Read `edgemix.json` and check that it is sound and that every file it lists is there in its full size.

    What it does not do is read those files: see `verify_bundle`.

    Raises:
        BundleError: There is no bundle, it is from a newer edgemix, or it is damaged or unsafe.
    """
    path = bundle / MANIFEST
    data = _read_manifest_bytes(bundle, path)
    try:
        schema = msgspec.json.decode(data, type=_Header).schema
        if schema > SCHEMA:
            raise BundleError(
                f"{bundle} was made by a newer edgemix (schema {schema}; this one reads up to {SCHEMA})",
                "Upgrade: pip install --upgrade edgemix",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        document = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}", EXPORT_AGAIN) from None
    if problems := faults(manifest):
        lines = [problem[:_LONGEST_LINE] for problem in problems[:_MOST_LINES]]
        raise BundleError("\n  ".join([f"{path} cannot be trusted:", *lines]), EXPORT_AGAIN)
    if manifest.checksum != checksum_of(document):
        raise BundleError(f"{path} has changed: its checksum is not its own", EXPORT_AGAIN)
    _check_sizes(bundle, manifest)
    return manifest


def verify_bundle(
    bundle: Path,
    manifest: Manifest,
    *,
    checksums: bool = True,
    only: MemberEntry | None = None,
    progress: Progress = SILENT,
) -> None:
    """Check the bundle's files against its manifest, and that the lists of tokens among them make sense.

    Args:
        bundle: The folder that `manifest` was read from.
        manifest: From `read_manifest`.
        checksums: Read every file and compare its sha256, and the tokenizer's fingerprint. Without it: sizes, paths,
            and that the graphs' external data is listed and lies within its files.
        only: The graph that will be opened, where it is one alone; the others' files are not read.
        progress: Hears of the bytes read.

    Raises:
        BundleError: A file is missing, changed, not listed though it could be loaded, or outside the bundle.
    """
    _check_sizes(bundle, manifest)
    _check_unlisted(bundle, manifest)
    entries = manifest.graphs if only is None else (only,)
    if checksums:
        others = tuple(f"{PurePosixPath(entry.graph).parent}/" for entry in manifest.graphs if entry not in entries)
        files = {name: entry for name, entry in manifest.files.items() if not name.startswith(others)}
        with progress.stage("verify checksums", sum(entry.size for entry in files.values())) as task:
            for name, entry in files.items():
                if hash_file(resolve(bundle, name), task) != entry:
                    raise BundleError(f"{bundle}: {name} has changed: its sha256 is not the manifest's", EXPORT_AGAIN)
        _check_tokenizer(bundle, manifest)
    for member in entries:
        for graph in member.paths:
            _check_weights(bundle, manifest, member, graph)
        if member.draft is not None:
            draft_tokens(bundle, manifest, member.draft)
    ngram_table(bundle, manifest)


def draft_tokens(bundle: Path, manifest: Manifest, draft: DraftGraph) -> list[int]:
    """The ids of the tokens that a draft graph's logits are of, in their order.

    Raises:
        BundleError: They are not as many different ids, ascending, as the manifest says, or not the tokenizer's.
    """
    path = resolve(bundle, draft.tokens)
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        data = file.read(draft.vocabulary * _LONGEST_TOKEN + 1)
    try:
        tokens = msgspec.json.decode(data, type=list[int])
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}", EXPORT_AGAIN) from None
    ascending, end = all(one < other for one, other in pairwise(tokens)), manifest.tokenizer.vocabulary
    if not ascending or len(tokens) != draft.vocabulary or tokens[0] < 0 or tokens[-1] >= end:
        raise BundleError(
            f"{path} should hold {draft.vocabulary:,} different ids below {end:,}, ascending, and does not",
            EXPORT_AGAIN,
        )
    return tokens


def ngram_table(bundle: Path, manifest: Manifest) -> NgramTable | None:
    """What usually follows what; None where the bundle has no n-grams.

    Raises:
        BundleError: Their file is not of as many as the manifest says, or names tokens that there are not.
    """
    if not manifest.ngrams:
        return None
    from edgemix.ngram_table import NgramTable  # with numpy, which nothing else here needs

    return NgramTable.open(resolve(bundle, NGRAMS), manifest.ngrams, manifest.tokenizer.vocabulary)


def _check_weights(bundle: Path, manifest: Manifest, member: MemberEntry, graph: str) -> None:
    """Check that the weights of a member's graph are listed, and stored without their zeros if the manifest says so."""
    folder = PurePosixPath(graph).parent
    locations = sorted(external_files(resolve(bundle, graph)))
    for location in locations:
        if str(folder / location) not in manifest.files:
            raise BundleError(f"{bundle}: {graph} takes weights from {location!r}, which is not listed")
    sparse = [resolve(bundle, str(folder / location)) for location in locations if location.endswith(SUFFIX)]
    found = sum(read_header(path).size for path in sparse)
    if found != (member.sparse.size if member.sparse else 0):
        raise BundleError(f"{bundle}: the weights of {member.name!r} are not stored as {MANIFEST} says", EXPORT_AGAIN)


def _check_tokenizer(bundle: Path, manifest: Manifest) -> None:
    try:
        fingerprint = TokenizerIdentity.parse(resolve(bundle, TOKENIZER).read_bytes()).sha256()
    except InputError as error:
        raise BundleError(f"{bundle}: {TOKENIZER} is {error.message}", EXPORT_AGAIN) from None
    if fingerprint != manifest.tokenizer.sha256:
        raise BundleError(f"{bundle}: {TOKENIZER} is not the tokenizer that the members share", EXPORT_AGAIN)


def write_manifest(bundle: Path, manifest: Manifest) -> Manifest:
    """Put `manifest` in the bundle, in one step: a reader sees the old one or the new one, whatever happens.

    Returns:
        The manifest as it was written: of this edgemix's schema, with its checksum.

    Raises:
        EdgemixError: The manifest is unsound, or cannot be written (full disk, read-only folder).
    """
    if problems := faults(manifest):
        raise EdgemixError("\n  ".join([f"{bundle / MANIFEST} would be unsound, and is not written:", *problems]))
    sealed = msgspec.structs.replace(manifest, schema=SCHEMA).sealed()
    data = msgspec.json.format(msgspec.json.encode(sealed, order="deterministic"), indent=2)
    write_atomically(bundle / MANIFEST, data + b"\n")
    return sealed


def check_writable(bundle: Path) -> None:
    """Find out whether `write_manifest` will be allowed to write, before work whose result it shall keep.

    Raises:
        EdgemixError: It will not.
    """
    probe = bundle / f".{MANIFEST}.{os.getpid()}.tmp"
    with storage_errors(f"writing {bundle / MANIFEST}"):
        probe.touch()
        probe.unlink()


def graph_digest(manifest: Manifest, graph: str) -> str:
    """Of a graph of the bundle and the files beside it, from their checksums; another graph may lie beside it."""
    folder = PurePosixPath(graph).parent
    files = [file for file in manifest.files if PurePosixPath(file).is_relative_to(folder)]
    if not files:
        raise ValueError(f"the manifest lists no file in {folder}: it is not finished")
    lines = [f"{graph}\n", *(f"{file} {manifest.files[file].sha256}\n" for file in sorted(files))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` by one with `data`, in one step and safe from a power cut.

    Raises:
        EdgemixError: It cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(f"writing {path}"):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can do that (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hash_file(path: Path, task: Task | None = None) -> FileEntry:
    """Size and sha256 of a file, read in small pieces; `task` advances by the bytes read.

    Raises:
        EdgemixError: The file cannot be read.
    """
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
    with storage_errors(f"reading {path}"), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            if task is not None:
                task.advance(count)
    return FileEntry(size=size, sha256=digest.hexdigest())


def files_in(folder: Path) -> Iterator[Path]:
    """Every file under a folder, links to folders not followed; none if it does not exist."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def _read_manifest_bytes(bundle: Path, path: Path) -> bytes:
    with storage_errors(f"reading {path}"):
        if not bundle.exists():
            raise BundleError(f"{bundle}: there is no such bundle", "Make one with: edgemix export RECIPE -o BUNDLE")
        if not bundle.is_dir():
            raise BundleError(f"{bundle}: is not a folder, and a bundle is one")
        if not path.is_file():
            raise BundleError(f"{bundle}: is not a bundle, it has no {MANIFEST}")
        with resolve(bundle, MANIFEST).open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has more than {MAX_MANIFEST_BYTES:,} bytes: it is no manifest")
    return data


def _check_sizes(bundle: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = resolve(bundle, name)
        with storage_errors(f"reading {path}"):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                raise BundleError(f"{bundle}: {name} is missing", EXPORT_AGAIN) from None
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{bundle}: {name} is not a regular file")
        if status.st_size != entry.size:
            raise BundleError(
                f"{bundle}: {name} has {status.st_size:,} bytes, and should have {entry.size:,}", EXPORT_AGAIN
            )


def _check_unlisted(bundle: Path, manifest: Manifest) -> None:
    for path in files_in(bundle):
        name = path.relative_to(bundle).as_posix()
        if name not in manifest.files and name != MANIFEST and path.suffix in _LOADABLE:
            raise BundleError(f"{bundle}: {name} is not listed in {MANIFEST}", "Remove it if you know what it is.")
