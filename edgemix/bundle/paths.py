"""Check that relative paths from untrusted files stay inside their folder, on every system."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgemix.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

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
