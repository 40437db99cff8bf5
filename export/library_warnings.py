"""Collect what libraries warn about while they load models and tokenizers, and show each warning once.

The command line silences libraries, whose loggers and warnings know nothing of its progress bars. While something is
loaded, their warnings are collected here instead.
"""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "gguf",
    "huggingface_hub",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
"""The loggers whose warnings are recorded."""

_FOR_DEVELOPERS = (DeprecationWarning, FutureWarning, ImportWarning, PendingDeprecationWarning, ResourceWarning)
"""Kinds of warnings that are about a library's interface, not about the files."""

_HARMLESS = {
    r"LOAD REPORT": "edgemix judges missing and unexpected tensors itself",
    r"both are present in the checkpoints with different values": "both are kept, and the configuration says so",
    r"CUDA-fused xIELU not available": "said of every Apertus model",
    r"tie_word_embeddings": "edgemix unties what an adapter changes, and compares the merged model",
    r"LoRA tensor\(s\) have invalid shape": "edgemix compares the shapes of an adapter's file itself",
    r"Setting fan_in_fan_out to": "PEFT corrects it by itself",
    r"Special tokens have been added in the vocabulary": "said of any tokenizer that adds some",
    r"generation flags are not valid": "edgemix samples by itself",
}
"""Patterns of the messages that are never shown, and why."""

_LONGEST = 400
"""Characters of a message that are shown."""


class _WarningLog:
    """The warnings of one run."""

    def __init__(self, progress: Progress, *, strict: bool) -> None:
        self._progress, self._strict = progress, strict
        self._shown: set[str] = set()

    def show(self, name: str, found: list[str]) -> None:
        """Show the warnings that have not been shown yet; with `strict`, raise an InputError if there are any."""
        if self._strict and found:
            raise InputError(
                "\n  ".join([f"{name}: libraries warn while they read it:", *found]),
                "Without --strict, this is a note.",
            )
        for line in found:
            if line not in self._shown:
                self._shown.add(line)
                self._progress.log(f"{name}: {line}")


_LOG: ContextVar[_WarningLog | None] = ContextVar("library_warnings", default=None)


@contextmanager
def library_warnings(progress: Progress = NO_PROGRESS, *, strict: bool = False) -> Iterator[None]:
    """Show what libraries warn about while files are read inside the block.

    Args:
        progress: Receives each warning once.
        strict: Raise an InputError instead.
    """
    token = _LOG.set(_WarningLog(progress, strict=strict))
    try:
        yield
    finally:
        _LOG.reset(token)


@contextmanager
def collected(name: str) -> Iterator[list[str]]:
    """Collect the warnings of libraries inside the block, then show them; outside `library_warnings`, as Python's.

    Args:
        name: What is read, with which each message begins.

    Yields:
        All messages so far, as they are; the caller may add some of its own.
    """
    found: list[str] = []
    with _heard(found):
        yield found
    log, lines = _LOG.get(), list(dict.fromkeys(_shortened(line) for line in found if not _is_harmless(line)))
    if log is not None:
        log.show(name, lines)
        return
    for line in lines:
        warnings.warn(f"{name}: {line}", stacklevel=4)


class _Handler(logging.Handler):
    """Adds the messages of a logger to a list."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(f"{record.name.partition('.')[0]} warns: {record.getMessage()}")


@contextmanager
def _heard(found: list[str]) -> Iterator[None]:
    """Add what libraries log and warn about to `found`, and keep it from being printed."""
    from transformers.utils.logging import warning_once

    warning_once.cache_clear()  # else the second member with the same fault would pass in silence
    handler, loggers = _Handler(found), [logging.getLogger(name) for name in _LIBRARIES]
    before = [(each.handlers, each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.handlers, each.propagate = [handler], False
        each.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
            each.handlers, each.propagate = handlers, propagate
            each.setLevel(level)
        found.extend(
            f"{_library(warning.filename)} warns: {warning.message}"
            for warning in caught
            if not issubclass(warning.category, _FOR_DEVELOPERS)
        )


def _is_harmless(line: str) -> bool:
    return any(re.search(pattern, line) for pattern in _HARMLESS)


def _shortened(line: str) -> str:
    line = " ".join(line.split())
    return f"{line[:_LONGEST]}{'...' if len(line) > _LONGEST else ''}"


def _library(filename: str) -> str:
    """Return the package of a source file: the folder below site-packages, else the file's own."""
    parts = filename.replace("\\", "/").split("/")
    if "site-packages" in parts[:-1]:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    return parts[-2] if len(parts) > 1 else parts[-1]
