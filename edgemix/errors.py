"""The errors that edgemix raises: what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPORT_AGAIN = "Export or download the bundle again."
"""The remedy for a damaged bundle."""


class EdgemixError(Exception):
    """A run that failed; the command line prints it without a traceback and exits with `exit_code`.

    Args:
        message: What is wrong and where, one sentence or a few lines.
        remedy: What the user can do about it; empty when the message already says so.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class InputError(EdgemixError):
    """The user's input is wrong: an argument, a prompt, a text file, a model folder (exit code 2)."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe with mistakes; the message lists all of them, each with its line."""


class BundleError(InputError):
    """A bundle that is missing, damaged, from a newer edgemix, or unsafe to open."""


class ParityError(EdgemixError):
    """An exported graph is further from its source than its format allows; the message holds the figures."""


@contextmanager
def library_errors(doing: str, remedy: str = "", kind: type[EdgemixError] = EdgemixError) -> Iterator[None]:
    """Turn all that a native library raises inside the block into EdgemixErrors: a panic in Rust is no Exception.

    Args:
        doing: The operation, with which the message begins.
        remedy: What the user can do about it.
        kind: Class of the error.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, EdgemixError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise kind(f"{doing}: {type(error).__name__} {error}".rstrip(), remedy) from error


def _is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked; other exceptions beside `Exception` end or cancel the work around it."""
    return type(error).__name__ == "PanicException"


_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) say what the system said; their errors are no OSErrors."""


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn OSErrors inside the block into EdgemixErrors, and errors of libraries that stand for one.

    Args:
        doing: The operation, with which the message begins: "writing out/edgemix.json".
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and type(error) is not OSError:  # network libraries also derive from it
            raise
        # numpy gives no number for a write that was cut short
        number = errno.ENOSPC if error.errno is None else error.errno
        raise _storage_error(doing, number, error.strerror or str(error)) from error
    except EdgemixError:
        raise
    except Exception as error:
        if (found := _SYSTEM_ERROR.search(str(error))) is None:
            raise
        raise _storage_error(doing, int(found[1]), os.strerror(int(found[1]))) from error


def _storage_error(doing: str, number: int, reason: str) -> EdgemixError:
    message = f"{doing}: {reason.lower()}"
    if number in _NO_SPACE:
        return EdgemixError(message, "Free some space there, or choose another disk.")
    if number in _NOT_ALLOWED:
        return InputError(message, "Change the permissions, or choose another folder.")
    return EdgemixError(message)
