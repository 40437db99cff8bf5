"""A folder that long work writes: refused before the work if it is there, one run at a time, complete or not there."""

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


def prepare(output: Path) -> None:
    """Refuse before any work what would destroy something after it, and make the folder that `output` goes in.

    Raises:
        InputError: The output is there already, or its folder cannot be made.
    """
    with storage_errors(f"making a folder for {output}"):
        if output.exists():
            raise InputError(f"{output}: is there already", "Choose another folder, or remove it.")
        if file := next((path for path in output.parents if path.exists() and not path.is_dir()), None):
            raise InputError(f"{output}: {file} is a file", "Choose another folder.")
        output.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Keep a second run away from the same output, whose checkpoints it would overwrite.

    Raises:
        InputError: Another run is at it, or the folder cannot be written.
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
def written(output: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes `output` in one step when the block ends well.

    Raises:
        EdgemixError: The disk refuses, inside the block too.
    """
    staging = output.with_name(f".{output.name}.partial")
    with storage_errors(f"writing {output}"):
        shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
        staging.mkdir()
        yield staging
        staging.rename(output)


def seal(folder: Path) -> None:
    """Note the sizes of a folder's files, for `sealed`: where the power fails, a file may lose its end."""
    write_atomically(folder / _SEAL, json.dumps(_sizes(folder)).encode())


def sealed(folder: Path) -> bool:
    """Whether a folder is there, with all files as they were when it was sealed."""
    try:
        return bool(json.loads((folder / _SEAL).read_bytes()) == _sizes(folder))
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in files_in(folder) if path.name != _SEAL)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
