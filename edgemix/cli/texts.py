"""The texts that commands take: a prompt from wherever it is given, and files as documents."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from edgemix.errors import InputError


def with_line_ends(template: str | None) -> str | None:
    r"""A template as it was meant: shells pass a typed \n as two characters."""
    return None if template is None else template.replace("\\n", "\n")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, a file or stdin (one line end at its end does not count).

    Raises:
        click.UsageError: It is given twice, or not at all and stdin is a terminal.
        InputError: It is empty or no UTF-8.
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
    """Each file's documents by the file's name without its suffix (by its path where two names are the same).

    Raises:
        click.UsageError: There is a template, and no .jsonl file that it could be for.
        InputError: A file is missing, empty, not UTF-8 or has a line that does not fit.
    """
    from edgemix.recipe.text_sources import TextSource, read_documents

    if template is not None and not any(file.suffix == ".jsonl" for file in files):
        raise click.UsageError("--template is for .jsonl files, and there is none.")
    if repeated := [file for file, count in Counter(files).items() if count > 1]:
        raise click.UsageError(f"{repeated[0]} is given twice.")
    stems = Counter(file.stem for file in files)
    return {
        file.stem if stems[file.stem] == 1 else str(file): read_documents(
            TextSource(str(file), template if file.suffix == ".jsonl" else None), Path()
        )
        for file in files
    }


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        InputError: It is missing, empty or not UTF-8, or holds several texts.
    """
    from edgemix.recipe.text_sources import TextSource, read_documents

    documents = read_documents(TextSource(str(file)), Path())
    if len(documents) != 1:
        raise InputError(f"{file} holds {len(documents)} texts, and one is needed here")
    return documents[0]


def _checked_argument(prompt: str) -> str:
    """The argument, which the system hands over as bytes, must be text."""
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
