"""Read the text files of recipes and commands as documents."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class TextSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    r"""A UTF-8 text file, or a file of JSON objects each of which is a document: its `text` field, or `template` filled
    in with the object's fields (`"Question: {question}\nAnswer: {answer}\n"`).
    """

    file: str
    template: str | None = None


MAX_BYTES = 1 << 30
"""Largest text file that is read, in bytes: documents are held in memory."""
_LINES, _LIST = (".jsonl", ".ndjson"), ".json"
"""Suffixes of files of JSON objects, in any case: one a line, or all in a list."""
_NO_TEXT = {
    re.compile(rb"\x1f\x8b"): "compressed with gzip",
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): "compressed with bzip2",
    re.compile(rb"\xfd7zXZ"): "compressed with xz",
    re.compile(rb"\x28\xb5\x2f\xfd"): "compressed with zstd",
    re.compile(rb"PK\x03\x04"): "a zip archive",
    re.compile(rb"PAR1(?s:.*)PAR1\Z"): "a Parquet file",
    re.compile(rb"ARROW1\x00\x00"): "an Arrow file",
    re.compile(rb"\xff\xfe|\xfe\xff"): "UTF-16, not UTF-8",
}
"""What files begin with that are no UTF-8 text, though some of them would decode."""
_HEAD, _HEAD_LINES = 1 << 16, 5
"""Characters and lines by which JSON objects are known in a file of another name."""
_SURROGATE = re.compile(
    r"\\u[dD][89aAbB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89aAbB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""Half of a surrogate pair, in JSON."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NOT_A_NUMBER = re.compile(r"[:\[,]\s*(-?Infinity|NaN)\b")


def holds_objects(name: str) -> bool:
    """Whether a file of that name holds JSON objects, which a template can make text of."""
    return name.lower().endswith((*_LINES, _LIST))


def read_documents(source: TextSource, folder: Path) -> list[str]:
    """Read a UTF-8 text file as one document, or every object of a .jsonl, .ndjson or .json file as one.

    Args:
        source: The file, and for JSON the template that its objects fill (without one: their `text`).
        folder: What a relative path is relative to.

    Raises:
        InputError: The file is missing, too large, no UTF-8, empty, has an object that does not fit, or is JSON by its
            content and not by its name.
    """
    path = _path(source.file, folder)
    text = read_plain(path)
    if holds_objects(path.name):
        template = parse_template(source.template or "{text}")
        documents = [
            "".join(literal + _field(where, fields, name) for literal, name in template)
            for where, fields in _objects(path, text)
        ]
    elif source.template is not None:
        raise InputError(f"{path}: a template is only for .jsonl, .ndjson and .json files")
    elif _looks_like_objects(text):
        raise InputError(f"{path}: its lines are JSON objects", "Name it .jsonl, so that each line is a document.")
    else:
        documents = [text]
    documents = [document for document in documents if document and not document.isspace()]
    if not documents:
        raise InputError(f"{path}: has no text", "Name a file that holds some.")
    return documents


def read_objects(file: str, folder: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the JSON objects of a .jsonl, .ndjson or .json file, each with its place for messages.

    Raises:
        InputError: As `read_documents`, or the file has another name.
    """
    path = _path(file, folder)
    if not holds_objects(path.name):
        raise InputError(f"{path}: is no .jsonl, .ndjson or .json file", "Write an example a line, as a JSON object.")
    yield from _objects(path, read_plain(path))


def _path(file: str, folder: Path) -> Path:
    try:
        return folder / Path(file).expanduser()
    except RuntimeError:  # ~ of an unknown user
        raise InputError(f"{file}: no such file") from None


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


def read_plain(path: Path) -> str:
    """Return the text of a UTF-8 file, whatever it is.

    Raises:
        InputError: The file is missing, too large, or no UTF-8 text.
    """
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
        data = path.read_bytes()
    if what := next((what for begins, what in _NO_TEXT.items() if begins.match(data)), None):
        raise InputError(f"{path}: is {what}", "Give plain UTF-8 text.")
    if (place := data.find(0)) >= 0:
        raise InputError(f"{path}: is no text: it has a NUL byte at offset {place}", "Give plain UTF-8 text.")
    return decode(data, f"{path}:")


def _objects(path: Path, text: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the objects of a file, each with its place."""
    if path.name.lower().endswith(_LIST) and text.lstrip().startswith("["):
        found = _decoded(text, list[dict[str, object]], f"{path}", "a list of JSON objects")
        yield from ((f"{path}: object {number}", fields) for number, fields in enumerate(found, start=1))
        return
    if text.split("\n", 1)[0].strip() == "{":  # an object over several lines
        yield f"{path}", _decoded(text, dict[str, object], f"{path}", "one JSON object, nor one in each line")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line and not line.isspace():
            where = f"{path}:{number}"
            yield where, _decoded(line, dict[str, object], where, "a JSON object")


def _decoded(text: str, kind: type[T], where: str, what: str) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if _SURROGATE.search(text) and "truncated" in reason:
            reason = "it has half of a surrogate pair, like \\ud800, which is no character"
        elif found := _NOT_A_NUMBER.search(_STRING.sub('""', text)):
            reason = f"{found[1]} is no JSON"
        raise InputError(f"{where}: is not {what}: {reason}") from None


def _looks_like_objects(text: str) -> bool:
    """Whether the first lines of a text are JSON objects, several of them."""
    lines = [line for line in text[:_HEAD].split("\n")[:_HEAD_LINES] if line and not line.isspace()]
    if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
        return False
    try:
        for line in lines[: -1 if len(text) > _HEAD else None]:  # the last may have been cut
            msgspec.json.decode(line, type=dict[str, object])
    except (ValueError, RecursionError):
        return False
    return True


def _field(where: str, fields: dict[str, object], name: str | None) -> str:
    if name is None:
        return ""
    value = fields.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    problem = "is no text or number" if name in fields else "is missing"
    raise InputError(
        f"{where}: the field {name!r} {problem}",
        f"Its fields: {', '.join(list(fields)[:10]) or 'none'}. Name those to use in a template.",
    )
