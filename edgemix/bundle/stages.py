"""Finished stages of an export, kept on disk so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edgemix.bundle.paths import resolve
from edgemix.errors import storage_errors
from edgemix.files import files_in, sync_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


T = TypeVar("T")


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
        """Return the result of a finished stage, or None if it must run: it never finished, had other inputs, or its
        files have changed since. What an outdated stage has written is removed.

        Args:
            name: The stage, as a relative path ("quantize/math").
            key: Digest of its inputs now, from `stage_key`.
            kind: Type of the result that was given to `mark_done`.
        """
        path = self._path(name)
        with storage_errors(f"reading {path}"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=_StageRecord)
                result = msgspec.json.decode(record.facts, type=kind)
            except (FileNotFoundError, ValueError):
                return None
            if record.key == key and record.files == self._state(record.files):
                return result
            path.unlink()
            for file in record.files:
                resolve(self._staging, file).unlink(missing_ok=True)
        return None

    def mark_done(self, name: str, key: str, result: Any = True, files: Iterable[Path] = ()) -> None:
        """Record a stage as finished.

        Args:
            name: The stage, as a relative path.
            key: Digest of its inputs, from `stage_key`.
            result: What later stages must know; anything that msgspec writes and reads as JSON.
            files: The files that it wrote under the writer's `folder` or `scratch`; a folder stands for all in it.
        """
        with storage_errors(f"writing {self._staging}"):
            written = [path for file in files for path in (files_in(file) if file.is_dir() else [file])]
            for path in written:
                sync_file(path)
            state = self._state(path.relative_to(self._staging).as_posix() for path in written)
            record = _StageRecord(key, msgspec.Raw(msgspec.json.encode(result)), state)
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(name), msgspec.json.encode(record))

    def _path(self, name: str) -> Path:
        return resolve(self._records, f"{name}.json")

    def _state(self, files: Iterable[str]) -> dict[str, tuple[int, int]]:
        paths = {file: resolve(self._staging, file) for file in files}
        found = {file: path.stat() for file, path in paths.items() if path.is_file()}
        return {file: (status.st_size, status.st_mtime_ns) for file, status in found.items()}


def stage_key(**inputs: Any) -> str:
    """Return a digest of all that a stage's result depends on: recipe parts, settings, checksums of files, versions."""
    return hashlib.sha256(msgspec.json.encode(inputs, enc_hook=str, order="deterministic")).hexdigest()
