"""Read and check a bundle without running it.

Nothing in a manifest is trusted before it is checked, so that a damaged or hostile bundle is refused before
any memory is allocated by its numbers or any file outside it is opened.
"""

from __future__ import annotations

import hashlib
import stat
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from edgemix.bundle.manifest import (
    MANIFEST,
    NGRAMS,
    SCHEMA,
    BundleManifest,
    DraftGraph,
    Manifest,
    checksum_of,
)
from edgemix.bundle.manifest_validation import validation_errors
from edgemix.bundle.paths import recover_replaced, resolve
from edgemix.errors import EXPORT_AGAIN, BundleError, storage_errors
from edgemix.tasks import DEFAULT_TASK, TASKS

if TYPE_CHECKING:
    from edgemix.bundle.label_bundle.manifest import LabelManifest
    from edgemix.bundle.ngram_table import NgramTable


MAX_MANIFEST_BYTES = 16 << 20
_LONGEST_TOKEN = 16
"""Most characters of a token's id in JSON, and what stands around it."""
_MOST_LINES, _LONGEST_LINE = 20, 300  # of what is said about a manifest that may be hostile


class _Header(msgspec.Struct):
    """What every version of the manifest has."""

    schema: int
    task: str = DEFAULT_TASK


def errors_in(manifest: BundleManifest) -> list[str]:
    """Return what is wrong with a decoded manifest of any task, one line each."""
    if isinstance(manifest, Manifest):
        return validation_errors(manifest)
    from edgemix.bundle.label_bundle.manifest import LabelManifest
    from edgemix.bundle.label_bundle.validation import label_validation_errors

    return label_validation_errors(manifest) if isinstance(manifest, LabelManifest) else ["it is of no task"]


def read_manifest(bundle: Path) -> Manifest:
    """Read the manifest of a mixture of language models; see `read_any_manifest`.

    Raises:
        BundleError: As there, or the bundle is of another task.
    """
    manifest = read_any_manifest(bundle)
    if not isinstance(manifest, Manifest):
        raise BundleError(
            f"{bundle}: is a bundle of {manifest.task}, and this needs one of {DEFAULT_TASK}",
            "Use edgemix predict, or edgemix.load in Python.",
        )
    return manifest


def read_any_manifest(bundle: Path) -> Manifest | LabelManifest:
    """Read `edgemix.json` and check that it is sound and that every file it lists is there in its full size.

    What it does not do is read those files: see `verify_bundle`.

    Raises:
        BundleError: There is no bundle, it is from a newer edgemix, or it is damaged or unsafe.
    """
    path = bundle / MANIFEST
    data = _read_manifest_bytes(bundle, path)
    try:
        header = msgspec.json.decode(data, type=_Header)
        schema = header.schema
        if schema > SCHEMA:
            raise BundleError(
                f"{bundle} was made by a newer edgemix (schema {schema}; this one reads up to {SCHEMA})",
                "Upgrade: pip install --upgrade edgemix",
            )
        if header.task not in TASKS:
            raise ValueError(f"it names the task {header.task[:80]!r}")
        kind: type[Manifest | LabelManifest] = TASKS[header.task].load("manifest")
        manifest = msgspec.json.decode(data, type=kind)
        document = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}", EXPORT_AGAIN) from None
    if problems := errors_in(manifest):
        lines = [problem[:_LONGEST_LINE] for problem in problems[:_MOST_LINES]]
        raise BundleError("\n  ".join([f"{path} cannot be trusted:", *lines]), EXPORT_AGAIN)
    if manifest.checksum != checksum_of(document):
        raise BundleError(f"{path} has changed: its checksum is not its own", EXPORT_AGAIN)
    check_sizes(bundle, manifest)
    return manifest


def draft_tokens(bundle: Path, manifest: Manifest, draft: DraftGraph) -> list[int]:
    """Read the token ids of a draft graph's logits, in their order.

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
    ascending, end = all(one < other for one, other in pairwise(tokens)), manifest.vocabulary
    if not ascending or len(tokens) != draft.vocabulary or tokens[0] < 0 or tokens[-1] >= end:
        raise BundleError(
            f"{path} should hold {draft.vocabulary:,} different ids below {end:,}, ascending, and does not",
            EXPORT_AGAIN,
        )
    return tokens


def ngram_table(bundle: Path, manifest: Manifest) -> NgramTable | None:
    """Open the bundle's n-grams; None where it has none.

    Raises:
        BundleError: Their file is not of as many as the manifest says, or names tokens that there are not.
    """
    if not manifest.ngrams:
        return None
    from edgemix.bundle.ngram_table import NgramTable

    return NgramTable.open(resolve(bundle, NGRAMS), manifest.ngrams, manifest.vocabulary)


def graph_digest(manifest: Manifest, graph: str) -> str:
    """Return a sha256 over a graph of the bundle and the files beside it, from their checksums."""
    folder = PurePosixPath(graph).parent
    files = [file for file in manifest.files if PurePosixPath(file).is_relative_to(folder)]
    if not files:
        raise ValueError(f"the manifest lists no file in {folder}: it is not finished")
    lines = [f"{graph}\n", *(f"{file} {manifest.files[file].sha256}\n" for file in sorted(files))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_manifest_bytes(bundle: Path, path: Path) -> bytes:
    with storage_errors(f"reading {path}"):
        if not bundle.exists() and not recover_replaced(bundle):
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


def check_sizes(bundle: Path, manifest: BundleManifest) -> None:
    """Raise a BundleError unless every listed file is there in its full size."""
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
