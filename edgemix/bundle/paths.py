"""The paths of a bundle: those from untrusted files stay inside its folder, and it is built beside its place."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from edgemix.errors import BundleError, InputError
from edgemix.files import acquire_lock

if TYPE_CHECKING:
    from pathlib import Path

REPLACED = "replaced"
"""The old bundle in the staging folder, between the two steps of a move."""
_PATIENCE = 20
_LONGEST = 1024
_LONGEST_PART = 255
# Not allowed in Windows file names. It also keeps out ONNX Runtime's tag for weights at a memory address, which has *.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\\ud800-\udfff]')


def path_error(path: str) -> str | None:
    """Return why `path` is no plain relative path with forward slashes (`members/a/model.onnx`); None if it is one."""
    parts = path.split("/")
    reasons = {
        "is empty": not path,
        "is too long": len(path) > _LONGEST
        or max(len(part.encode(errors="replace")) for part in parts) > _LONGEST_PART,
        "is absolute": path.startswith("/"),
        "contains ..": ".." in parts,
        "has an empty part": "" in parts or "." in parts,
        "has a character that is not allowed": _FORBIDDEN.search(path) is not None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def resolve(folder: Path, relative: str) -> Path:
    """Return the path of `relative` in `folder`.

    Raises:
        BundleError: It would leave the folder, by its text or through a symbolic link.
    """
    if reason := path_error(relative):
        raise BundleError(f"{folder}: the path {relative[:_LONGEST]!r} {reason}", "Do not use this bundle.")
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise BundleError(f"{folder}: the path {relative!r} cannot be followed ({error})") from error
    if not inside:
        raise BundleError(
            f"{folder}: {relative!r} is a symbolic link that leaves the folder",
            "Copy the folder with the links followed (cp -rL) and use the copy.",
        )
    return path


def staging_folder(bundle: Path) -> Path:
    """Return where a bundle is built, beside its place."""
    return bundle.with_name(f".{bundle.name}.partial")


def recover_replaced(bundle: Path) -> bool:
    """Put a bundle back that was being replaced when the export was killed; waits for a moment where one is at it.

    Returns:
        Whether there is a bundle now.
    """
    bundle = bundle.resolve()
    staging = staging_folder(bundle) if bundle.name else bundle
    for _ in range(_PATIENCE):
        if bundle.exists() or not (staging / REPLACED).is_dir():
            break
        try:
            lock = acquire_lock(staging / "lock")
        except InputError:
            time.sleep(0.01)  # the export goes on with the second step
            continue
        try:
            if not bundle.exists() and (staging / REPLACED).is_dir():
                (staging / REPLACED).rename(bundle)
        finally:
            lock.release()
    return bundle.exists()
