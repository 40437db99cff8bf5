"""Read the texts that commands take: a prompt, and files as documents."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from edgemix.errors import InputError


def unescape_newlines(template: str | None) -> str | None:
    r"""Replace a typed \n, which shells pass as two characters, by a line end."""
    return None if template is None else template.replace("\\n", "\n")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, a file or stdin, without one final line end.

    Raises:
        click.UsageError: The prompt is given twice, or not at all and stdin is a terminal.
        InputError: The prompt is empty or not UTF-8.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("Give the prompt as an argument or with --file, not both.")
    if file is not None:
        return _not_empty(_without_line_end(read_text(file)), str(file))
    if prompt is not None and prompt != "-":
        return _not_empty(_checked_argument(prompt), "the prompt")
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("No prompt: give it as an argument, with --file, or on stdin.")
    from edgemix.recipe.text_sources import decode

    return _not_empty(_without_line_end(decode(sys.stdin.buffer.read(), "stdin")), "stdin")


def read_files(files: tuple[Path, ...], template: str | None) -> dict[str, list[str]]:
    """Return each file's documents, by the file's name without suffix, or by its path where two names are equal.

    Raises:
        click.UsageError: A template is given without a file of JSON objects, or a file is given twice.
        InputError: A file is missing, empty, not UTF-8, or has a line that does not fit the template.
    """
    from edgemix.recipe.text_sources import TextSource, holds_objects, read_documents

    if template is not None and not any(holds_objects(file.name) for file in files):
        raise click.UsageError("--template is for .jsonl, .ndjson and .json files, and there is none.")
    if repeated := [file for file, count in Counter(files).items() if count > 1]:
        raise click.UsageError(f"{repeated[0]} is given twice.")
    stems = Counter(file.stem for file in files)
    return {
        file.stem if stems[file.stem] == 1 else str(file): read_documents(
            TextSource(str(file), template if holds_objects(file.name) else None), Path()
        )
        for file in files
    }


def read_text(file: Path) -> str:
    """Return the text of a file: a prompt, or a schema.

    Raises:
        InputError: The file is missing, empty or not UTF-8.
    """
    from edgemix.recipe.text_sources import read_plain

    if not (text := read_plain(file)).strip():
        raise InputError(f"{file}: has no text", "Name a file that holds some.")
    return text


def _checked_argument(prompt: str) -> str:
    """Return the argument if it is valid UTF-8; the system passes it as bytes."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(
            "the prompt is not UTF-8", "Check the terminal's encoding, or give the prompt in a file."
        ) from None
    return prompt


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _not_empty(prompt: str, where: str) -> str:
    if not prompt:
        raise InputError(f"{where} is empty", "Give some text to continue.")
    return prompt
