"""Where a bundle is built: a folder beside its place that survives a kill, so that finished stages are kept.

.NAME.partial/
  lock            held while an export runs
  bundle/         becomes NAME
  scratch/        what stages leave for each other and the bundle does not need
  stages/         one record for each finished stage
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from edgemix.bundle.external_data import external_files
from edgemix.bundle.manifest import MANIFEST, SCHEMA, TOKENIZER, BundleManifest
from edgemix.bundle.paths import REPLACED, resolve, staging_folder
from edgemix.bundle.reader import errors_in
from edgemix.bundle.stages import Stages
from edgemix.bundle.verify import verify_any_bundle
from edgemix.errors import EdgemixError, InputError, storage_errors
from edgemix.files import (
    acquire_lock,
    exchange_folders,
    files_in,
    hash_file,
    sync_file,
    sync_folder,
    temporary_beside,
    write_atomically,
)
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from filelock import FileLock

M = TypeVar("M", bound=BundleManifest)


class BundleWriter:
    """Builds a bundle out of sight and moves it to its place when it is whole.

        with BundleWriter(output) as writer:
            key = stage_key(seed=0, model=digest)
            config = writer.stages.done("graph/a", key, GraphConfig)
            if config is None:
                config = build(writer.folder / "members/a")
                writer.stages.mark_done("graph/a", key, config, files=[writer.folder / "members/a"])
            manifest = writer.finish(manifest)

    Leaving the block without `finish` (an error, Ctrl-C, a kill) leaves no bundle, or the old one as it was; the next
    writer for the same output finds the finished stages.

    Attributes:
        output: The bundle's place. An older bundle there is replaced at the end; anything else is refused.
        folder: Where the bundle's files are written until then.
        scratch: For files that the bundle does not need.
        stages: What is finished.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.resolve()
        self._staging = staging_folder(self.output) if self.output.name else self.output
        self.folder = self._staging / "bundle"
        self.scratch = self._staging / "scratch"
        self.stages = Stages(self._staging)
        self._lock: FileLock | None = None

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            InputError: The output is something else than a bundle, cannot be written, or another export is at it.
        """
        self._check_output()
        with storage_errors(f"writing beside {self.output}"):
            self._lock = acquire_lock(self._staging / "lock")
            try:
                self._recover()
                for folder in (self.folder, self.scratch):
                    folder.mkdir(exist_ok=True)
            except OSError:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.stages.any():
            shutil.rmtree(self._staging, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def finish(self, manifest: M, progress: Progress = NO_PROGRESS) -> M:
        """Complete `manifest` with the files' checksums, check the bundle, and move it to its place in one step.

        The bundle gets every graph with its external data, and the tokenizer's folder; other files, left by
        earlier runs of another recipe, are dropped.

        Returns:
            The manifest as it was written.

        Raises:
            EdgemixError: A file is missing or the disk refuses; the old bundle, if there was one, is untouched.
        """
        with storage_errors(f"writing {self.output}"):
            self._drop_leftovers(manifest)
            files = {}
            with progress.stage("checksums", sum(path.stat().st_size for path in files_in(self.folder))) as task:
                for path in sorted(files_in(self.folder)):
                    sync_file(path)
                    files[path.relative_to(self.folder).as_posix()] = hash_file(path, task)
            manifest = msgspec.structs.replace(manifest, files=files)
            manifest = write_manifest(self.folder, manifest)
            verify_any_bundle(self.folder, manifest, checksums=False)
            for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
                sync_folder(folder)
            self._check_output()
            self._move()
            sync_folder(self.output.parent)
            shutil.rmtree(self._staging, ignore_errors=True)
        return manifest

    def _check_output(self) -> None:
        output = self.output
        with storage_errors(f"looking at {output}"):
            if not output.name:
                raise InputError(f"{output}: is no place for a bundle", "Name a new folder.")
            if not output.parent.is_dir():
                raise InputError(f"{output}: there is no folder {output.parent}", f"mkdir -p {output.parent}")
            if output.exists() and not output.is_dir():
                raise InputError(f"{output}: is a file; a bundle is a folder", "Name a new folder.")
            if output.is_dir() and not (output / MANIFEST).is_file() and any(output.iterdir()):
                raise InputError(
                    f"{output}: holds other files, and no bundle that could be replaced", "Name a new folder."
                )

    def _recover(self) -> None:
        """Undo a move that was killed between its two steps, and remove what other moves left."""
        replaced = self._staging / REPLACED
        if replaced.exists() and not self.output.exists():
            replaced.rename(self.output)
        shutil.rmtree(replaced, ignore_errors=True)

    def _drop_leftovers(self, manifest: BundleManifest) -> None:
        needed = {resolve(self.folder, path) for path in manifest.stored_paths}
        if missing := sorted(path for path in needed if not path.is_file()):
            raise EdgemixError(f"{self.output}: {missing[0].relative_to(self.folder)} was never written")
        for graph in (resolve(self.folder, path) for path in manifest.graph_paths):
            needed |= {graph.parent / location for location in external_files(graph)}
        tokenizer = self.folder / PurePosixPath(TOKENIZER).parent
        for path in list(files_in(self.folder)):
            if path not in needed and not path.is_relative_to(tokenizer):
                path.unlink()
        _remove_empty_folders(self.folder)

    def _move(self) -> None:
        if not self.output.exists():
            self.folder.rename(self.output)
        elif not any(self.output.iterdir()):
            self.output.rmdir()
            self.folder.rename(self.output)
        elif not exchange_folders(self.folder, self.output):
            # For the moment between the two steps, readers find the old bundle where `recover_replaced` looks.
            replaced = self._staging / REPLACED
            self.output.rename(replaced)
            try:
                self.folder.rename(self.output)
            except OSError:
                replaced.rename(self.output)
                raise


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # the inner ones first
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def write_manifest(bundle: Path, manifest: M) -> M:
    """Put `manifest` in the bundle, in one step: a reader sees the old one or the new one, whatever happens.

    Returns:
        The manifest as it was written: of this edgemix's schema, with its checksum.

    Raises:
        EdgemixError: The manifest is unsound, or cannot be written (full disk, read-only folder).
    """
    if problems := errors_in(manifest):
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
    with storage_errors(f"writing {bundle / MANIFEST}"):
        probe = temporary_beside(bundle / MANIFEST)
        probe.touch()
        probe.unlink()
