"""Files: written atomically, hashed, listed, and locked."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgemix.bundle.manifest import (
    FileEntry,
)
from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemix.progress import ProgressTask


_CHUNK = 1 << 20


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


def hash_file(path: Path, task: ProgressTask | None = None) -> FileEntry:
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


def sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
