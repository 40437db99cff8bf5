"""Write files atomically, hash, list and lock them."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filelock import FileLock

    from edgemix.progress import ProgressTask

_CHUNK = 1 << 20
_STALE = 60.0 if os.name == "posix" else 86_400.0
"""Seconds after which a temporary file may be one that a killed process left; the folder may be another machine's, too.
"""
_LOCK_TIMEOUT = 0.1
"""Seconds; long enough to try again where a run that ends deletes its lock file in the same moment."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file's size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` with `data` in one step; a power cut leaves the old file or the new one.

    Raises:
        EdgemixError: It cannot be written; the old file is untouched.
    """
    with storage_errors(f"writing {path}"):
        temporary = temporary_beside(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    """Return a path beside `path` for this process to write to, and remove what killed processes left there.

    Raises:
        OSError: The folder cannot be read.
    """
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = other.name.split(".")[-2]
        with suppress(OSError):  # another run removes it, too
            if process.isdecimal() and time.time() - other.stat().st_mtime > _STALE and not _is_alive(int(process)):
                other.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_alive(process: int) -> bool:
    """Return whether a process of this machine runs; where that cannot be asked, only a day's age tells."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can do that (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hash_file(path: Path, task: ProgressTask | None = None) -> FileEntry:
    """Compute the size and sha256 of a file, read in small pieces; `task` advances by the bytes read.

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
    """Yield every file under a folder, without following links to folders; none if the folder does not exist."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def acquire_lock(path: Path) -> FileLock:
    """Take the lock file at `path` for this process, creating its folder if need be.

    The system frees the lock when the process that holds it dies, so it is never stale. The holder may delete the file,
    or the folder around it, before the release.

    Raises:
        InputError: Another process holds it.
    """
    from filelock import FileLock, Timeout  # 25 ms to import, which only writers need

    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path, timeout=_LOCK_TIMEOUT, poll_interval=0.01, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another run is writing to the same place: {path} is locked",
            "Wait for it to end, or name another output.",
        ) from None
    return lock


def exchange_folders(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system and the file system can (Linux, macOS); False if they cannot."""
    import ctypes

    system, here, names = sys.platform, -100, (os.fsencode(one), os.fsencode(other))  # AT_FDCWD
    if system == "linux":
        swap = getattr(ctypes.CDLL(None), "renameat2", None)
        return swap is not None and swap(here, names[0], here, names[1], 2) == 0  # RENAME_EXCHANGE
    if system == "darwin":
        swap = getattr(ctypes.CDLL(None), "renamex_np", None)
        return swap is not None and swap(*names, 2) == 0  # RENAME_SWAP
    return False


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
