"""Files that a command will write when its work is done."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from pathlib import Path


def check_output(path: Path) -> None:
    """Find out whether a file can be written, before minutes of work for it.

    Raises:
        InputError: It cannot be one.
        EdgemixError: The system does not let it.
    """
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise InputError(f"{path} is no file", "Give the name of one, or of one to be made.")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}", f"Make it: mkdir -p {path.parent}")
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(f"writing {path}"):
        probe.touch()
        probe.unlink()
