"""Read the text files of recipes and commands as documents."""

from __future__ import annotations

import stat
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

import msgspec

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator


class TextSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    r"""A UTF-8 text file, or a .jsonl file whose every line is a document: its `text` field, or `template` filled in
    with the line's fields (`"Question: {question}\nAnswer: {answer}\n"`).
    """

    file: str
    template: str | None = None


MAX_BYTES = 1 << 30
"""Largest text file that is read, in bytes: documents are held in memory."""


def read_documents(source: TextSource, folder: Path) -> list[str]:
    """Read a UTF-8 text file as one document, or every line of a .jsonl file as one.

    Args:
        source: The file, and for .jsonl the template that its lines fill (without one: their `text`).
        folder: What a relative path is relative to.

    Raises:
        InputError: The file is missing, too large, no UTF-8, empty, or has a line that does not fit.
    """
    try:
        path = folder / Path(source.file).expanduser()
    except RuntimeError:  # ~ of an unknown user
        raise InputError(f"{source.file}: no such file") from None
    text = _read_text(path)
    if path.suffix == ".jsonl":
        documents = list(_json_lines(path, text, parse_template(source.template or "{text}")))
    elif source.template is not None:
        raise InputError(f"{path}: a template is only for .jsonl files")
    else:
        documents = [text]
    documents = [document for document in documents if document and not document.isspace()]
    if not documents:
        raise InputError(f"{path}: has no text", "Name a file that holds some.")
    return documents


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text.

    Raises:
        InputError: They are not UTF-8; names `where` and the offset.
    """
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            "Convert it, for example with: iconv -f latin1 -t utf-8",
        ) from None


def parse_template(template: str) -> list[tuple[str, str | None]]:
    r"""Split `"Q: {question}\n"` into pairs of literal text and the name of the field after it, if one follows.

    Only plain `{name}` is understood: str.format would also follow `{name.attribute}` into Python's objects.

    Raises:
        InputError: The template is malformed, has more than plain fields, or no field at all.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"template {template!r}: {error}", "Double a brace to mean the character: {{ or }}."
        ) from error
    for _, field, specification, conversion in parts:
        if field is not None and (not field.isidentifier() or specification or conversion):
            raise InputError(
                f"template {template!r}: only plain field names may stand in braces, not {field!r}",
                "Write {name}; double a brace to mean the character: {{ or }}.",
            )
    if all(field is None for _, field, _, _ in parts):
        raise InputError(f"template {template!r}: names no field", 'Write for example "{question}\\n{answer}".')
    return [(literal, field) for literal, field, _, _ in parts]


def _read_text(path: Path) -> str:
    with storage_errors(f"reading {path}"):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: no such file") from None
        except ValueError as error:  # a NUL byte in the name
            raise InputError(f"{str(path)!r}: {error}") from None
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a folder", "Name the text files in it.")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a regular file", "Save the text to a file first.")
        if status.st_size > MAX_BYTES:
            raise InputError(
                f"{path}: has {status.st_size:,} bytes; at most {MAX_BYTES:,} are read", "Split it, or cut it."
            )
        return decode(path.read_bytes(), f"{path}:")


def _json_lines(path: Path, text: str, template: list[tuple[str, str | None]]) -> Iterator[str]:
    decoder = msgspec.json.Decoder(dict[str, object])
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            fields = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: is not a JSON object: {error}") from None
        yield "".join(literal + _field(path, number, fields, name) for literal, name in template)


def _field(path: Path, number: int, fields: dict[str, object], name: str | None) -> str:
    if name is None:
        return ""
    value = fields.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    problem = "is no text or number" if name in fields else "is missing"
    raise InputError(
        f"{path}:{number}: the field {name!r} {problem}",
        f"Its fields: {', '.join(list(fields)[:10]) or 'none'}. Name those to use in a template.",
    )
