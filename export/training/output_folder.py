"""Output folders of long runs: checked before the work, written by one run at a time, and complete or absent."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgemix.errors import InputError, storage_errors
from edgemix.files import acquire_lock, files_in, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SEAL = "edgemix-sizes.json"


def check_output(output: Path) -> None:
    """Refuse an output that exists already, before any work, and create its parent folder.

    Raises:
        InputError: The output exists already, or its parent folder cannot be created.
    """
    with storage_errors(f"making a folder for {output}"):
        if output.exists():
            raise InputError(f"{output}: is there already", "Choose another folder, or remove it.")
        if file := next((path for path in output.parents if path.exists() and not path.is_dir()), None):
            raise InputError(f"{output}: {file} is a file", "Choose another folder.")
        output.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Lock an output against a second run, which would overwrite its checkpoints.

    Raises:
        InputError: Another run holds the lock, or the folder cannot be written.
    """
    path = output.with_name(f".{output.name}.lock")
    with storage_errors(f"writing beside {output}"):
        lock = acquire_lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder to write to, which is renamed to `output` when the block succeeds.

    Raises:
        EdgemixError: The folder cannot be written, also from within the block.
    """
    staging = output.with_name(f".{output.name}.partial")
    with storage_errors(f"writing {output}"):
        shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
        staging.mkdir()
        yield staging
        staging.rename(output)


def seal(folder: Path) -> None:
    """Record the sizes of a folder's files for `sealed`: a power failure may truncate a file."""
    write_atomically(folder / _SEAL, json.dumps(_sizes(folder)).encode())


def sealed(folder: Path) -> bool:
    """Return whether a folder exists with all files of the sizes recorded by `seal`."""
    try:
        return bool(json.loads((folder / _SEAL).read_bytes()) == _sizes(folder))
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in files_in(folder) if path.name != _SEAL)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
