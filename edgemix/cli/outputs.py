"""Checks of the files that a command will write."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from pathlib import Path


def check_output_file(path: Path) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    Raises:
        InputError: The path exists and is not a file, or its folder does not exist.
        EdgemixError: The system does not allow writing there.
    """
    from edgemix.files import temporary_beside

    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise InputError(f"{path} is not a file", "Give the path of a file; it may exist or not.")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}", f"Make it: mkdir -p {path.parent}")
    with storage_errors(f"writing {path}"):
        probe = temporary_beside(path)
        probe.touch()
        probe.unlink()


def has_work(output: Path) -> bool:
    """Return whether a run that was interrupted left work beside its output, from which the next one goes on."""
    beside = output.parent.glob(f".{glob.escape(output.name)}.*")
    return any(path.suffix not in (".lock", ".tmp") for path in beside)
