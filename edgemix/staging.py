"""Where a bundle is built: a folder beside its place that survives a kill, so that finished stages are kept.

.NAME.partial/
  lock            held while an export runs
  bundle/         becomes NAME
  scratch/        what stages leave for each other and the bundle does not need
  stages/         one record for each finished stage
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from edgemix.bundle import (
    MANIFEST,
    NGRAMS,
    TOKENIZER,
    files_in,
    hash_file,
    sync_folder,
    verify_bundle,
    write_atomically,
    write_manifest,
)
from edgemix.errors import EdgemixError, InputError, storage_errors
from edgemix.external_data import external_files
from edgemix.progress import SILENT, Progress
from edgemix.safe_paths import resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgemix.manifest import Manifest

T = TypeVar("T")


class BundleWriter:
    """Builds a bundle out of sight and moves it to its place when it is whole.

        with BundleWriter(output) as writer:
            key = stage_key(seed=0, model=digest)
            facts = writer.stages.done("graph/a", key, GraphFacts)
            if facts is None:
                facts = build(writer.folder / "members/a")
                writer.stages.mark_done("graph/a", key, facts, files=[writer.folder / "members/a"])
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
        self._staging = self.output.with_name(f".{self.output.name}.partial") if self.output.name else self.output
        self.folder = self._staging / "bundle"
        self.scratch = self._staging / "scratch"
        self.stages = Stages(self._staging)
        self._lock = Lock(self._staging / "lock")

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            InputError: The output is something else than a bundle, cannot be written, or another export is at it.
        """
        self._check_output()
        with storage_errors(f"writing beside {self.output}"):
            self._lock.acquire()
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
        self._lock.release()

    def finish(self, manifest: Manifest, progress: Progress = SILENT) -> Manifest:
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
                    _sync_file(path)
                    files[path.relative_to(self.folder).as_posix()] = hash_file(path, task)
            manifest = msgspec.structs.replace(manifest, files=files)
            manifest = write_manifest(self.folder, manifest)
            verify_bundle(self.folder, manifest, checksums=False)
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
        """Undo a move that was killed between its two steps."""
        replaced = self._staging / "replaced"
        if replaced.exists() and not self.output.exists():
            replaced.rename(self.output)
        shutil.rmtree(replaced, ignore_errors=True)

    def _drop_leftovers(self, manifest: Manifest) -> None:
        needed = set()
        for entry in manifest.graphs:
            for stored in entry.paths:
                graph = resolve(self.folder, stored)
                if not graph.is_file():
                    raise EdgemixError(f"{self.output}: the graph of {entry.name!r} was never written")
                needed |= {graph, *(graph.parent / location for location in external_files(graph))}
            if entry.draft is not None:
                needed.add(resolve(self.folder, entry.draft.tokens))
        if manifest.ngrams:
            needed.add(resolve(self.folder, NGRAMS))
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
        elif not _exchange(self.folder, self.output):
            replaced = self._staging / "replaced"
            self.output.rename(replaced)
            try:
                self.folder.rename(self.output)
            except OSError:
                replaced.rename(self.output)
                raise


class _StageRecord(msgspec.Struct, frozen=True):
    """A finished stage: the key of its inputs, what it found, and the size and time of change of each file it wrote."""

    key: str
    facts: msgspec.Raw
    files: dict[str, tuple[int, int]]


class Stages:
    """The finished stages of an export, on disk. A stage is skipped if, and only if, its inputs are the same."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging
        self._records = staging / "stages"

    def any(self) -> bool:
        return any(True for _ in files_in(self._records))

    def done(self, name: str, key: str, kind: type[T]) -> T | None:
        """The facts of a finished stage, or None if it must run: it never finished, had other inputs, or its files
        have changed since. What an outdated stage has written is removed.

        Args:
            name: The stage, as a relative path ("quantize/math").
            key: Of its inputs now, from `stage_key`.
            kind: Type of the facts that were given to `mark_done`.
        """
        path = self._path(name)
        with storage_errors(f"reading {path}"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=_StageRecord)
                facts = msgspec.json.decode(record.facts, type=kind)
            except (FileNotFoundError, ValueError):
                return None
            if record.key == key and record.files == self._state(record.files):
                return facts
            path.unlink()
            for file in record.files:
                resolve(self._staging, file).unlink(missing_ok=True)
        return None

    def mark_done(self, name: str, key: str, facts: Any = True, files: Iterable[Path] = ()) -> None:
        """Record a stage as finished.

        Args:
            name: The stage, as a relative path.
            key: Of its inputs, from `stage_key`.
            facts: What later stages must know; anything that msgspec writes and reads as JSON.
            files: The files that it wrote under the writer's `folder` or `scratch`; a folder stands for all in it.
        """
        with storage_errors(f"writing {self._staging}"):
            written = [path for file in files for path in (files_in(file) if file.is_dir() else [file])]
            for path in written:
                _sync_file(path)
            state = self._state(path.relative_to(self._staging).as_posix() for path in written)
            record = _StageRecord(key, msgspec.Raw(msgspec.json.encode(facts)), state)
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(name), msgspec.json.encode(record))

    def _path(self, name: str) -> Path:
        return resolve(self._records, f"{name}.json")

    def _state(self, files: Iterable[str]) -> dict[str, tuple[int, int]]:
        paths = {file: resolve(self._staging, file) for file in files}
        found = {file: path.stat() for file, path in paths.items() if path.is_file()}
        return {file: (status.st_size, status.st_mtime_ns) for file, status in found.items()}


def stage_key(**inputs: Any) -> str:
    """A digest of everything that a stage's result depends on: recipe parts, settings, checksums of files, versions."""
    return hashlib.sha256(msgspec.json.encode(inputs, enc_hook=str, order="deterministic")).hexdigest()


class Lock:
    """One process at a time; the system frees it when its holder dies, so it is never stale."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, making its folder if need be.

        Raises:
            InputError: Another process holds it.
        """
        while self._descriptor is None:
            self._path.parent.mkdir(exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _try_lock(descriptor):
                os.close(descriptor)
                raise InputError(
                    f"another run is writing to the same place: {self._path} is locked",
                    "Wait for it to end, or name another output.",
                )
            # The holder before may have removed the file, its work being done, between the open and the lock.
            if self._path.exists() and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system and the file system can (Linux); False if they cannot."""
    if not sys.platform.startswith("linux"):
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # the inner ones first
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
