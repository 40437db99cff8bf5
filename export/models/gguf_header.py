"""Parse the header of a GGUF file: its metadata and the list of its tensors, checked against the size of the file.

Every count, length and offset is compared with the file before anything is allocated for it, so that no later reader of
the file meets a number that the file does not bear out.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemix.export.models.location import Location

_VERSIONS = (2, 3)
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
"""GGUF value type -> numpy's little-endian type."""
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 1 << 16, 1 << 18, 1 << 23
_LONGEST_KEY, _LONGEST_NAME = 1 << 16, 64
"""A key and a tensor's name in bytes, as the format has it."""
_MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 1 << 20

DAMAGED = "The file is damaged or not a GGUF file: download or convert it again."


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file.

    Attributes:
        name: Its name, as llama.cpp has it.
        shape: Its shape in torch's order, the innermost dimension last.
        kind: Number of its ggml type.
        offset: Its first byte in the file.
        size: Its bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file.

    Attributes:
        path: The file.
        metadata: Key -> value; arrays are lists of strings or numpy arrays.
        tensors: Name -> tensor.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def name(self) -> str:
        """Name of the file, for messages."""
        return self.path.name

    @property
    def architecture(self) -> str:
        """Architecture, with which the keys of the model's metadata begin."""
        return self.text("general.architecture")

    @cached_property
    def stated(self) -> dict[str, Any]:
        """Metadata of the model, without the architecture's name: "attention.head_count" and so on."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    @cached_property
    def tokens(self) -> list[str]:
        """Vocabulary in the order of its ids.

        Raises:
            InputError: There is none, or a token comes twice.
        """
        stated = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(stated, list) or not stated:
            raise InputError(f"{self.name}: no vocabulary (tokenizer.ggml.tokens)", "Convert the model again.")
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(stated)]
        if len(set(tokens)) != len(tokens):
            seen: set[str] = set()
            twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
            raise InputError(f"{self.name}: its vocabulary has the token {twice!r} twice", DAMAGED)
        return tokens

    def text(self, key: str, default: str | None = None) -> str:
        """Return a value that must be a string.

        Raises:
            InputError: It is none, or it is missing and there is no default.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise InputError(f"{self.name}: {key} must be a string, not {value!r:.60}", DAMAGED)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a value that must be true or false; see `text`."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.name}: {key} must be true or false, not {value!r:.60}", DAMAGED)
        return value

    def values(self, tensor: TensorEntry) -> np.ndarray:
        """Return the numbers of a tensor in F32."""
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            return np.frombuffer(file.read(tensor.size), "<f4").reshape(tensor.shape)

    def token_id(self, role: str) -> int | None:
        """Return the id of `tokenizer.ggml.ROLE_token_id`, if it is stated.

        Raises:
            InputError: The vocabulary has no such id.
        """
        key = f"tokenizer.ggml.{role}_token_id"
        value = self.metadata.get(key)
        if value is None:
            return self._usual_id(role)
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise InputError(
                f"{self.name}: {key} is {value!r:.60}, but its vocabulary has {len(self.tokens)} tokens", DAMAGED
            )
        return value

    def _usual_id(self, role: str) -> int | None:
        """Return the id that a SentencePiece vocabulary gives a role, unless the file states another."""
        index, text = {"unknown": (0, "<unk>"), "bos": (1, "<s>"), "eos": (2, "</s>")}.get(role, (0, ""))
        usual = self.metadata.get("tokenizer.ggml.model") == "llama" and self.tokens[index : index + 1] == [text]
        return index if usual else None


def gguf_header(location: Location) -> GgufHeader:
    """Parse the header of a location's GGUF file.

    Raises:
        InputError: It is damaged, or one part of several.
    """
    path = location.folder / str(location.gguf)
    with storage_errors(f"reading {path}"):
        stat = path.stat()
        header = _parsed(path, stat.st_size, stat.st_mtime_ns)
    _check_whole(header)
    return header


@lru_cache(maxsize=2)  # configuration, weights, tokenizer and license are read one after the other
def _parsed(path: Path, size: int, _changed: int) -> GgufHeader:
    with path.open("rb") as file:
        if size < len(b"GGUF") or file.read(4) != b"GGUF":
            raise InputError(f"{path.name}: does not begin with GGUF", DAMAGED)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).parse()


def _check_whole(header: GgufHeader) -> None:
    count = header.metadata.get("split.count", 1)
    if count in {0, 1}:
        return
    number = header.metadata.get("split.no", 0)
    part = f"part {number + 1} of {count}" if type(number) is int else f"one part of {count}"
    raise InputError(
        f"{header.name}: only {part} of a model",
        f"Join the parts: llama-gguf-split --merge {header.name} model.gguf (with the name of the first part).",
    )


class _Parser:
    """Cursor over the bytes of a GGUF file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 4

    def parse(self) -> GgufHeader:
        version = self._number("<I", "version")
        if version not in _VERSIONS:
            raise self._damaged(f"its version is {version}, not {' or '.join(map(str, _VERSIONS))}")
        tensors = self._count("tensors", _MOST_TENSORS, 8 + 4 + 8 + 4 + 8, width="<Q")
        keys = self._count("metadata", _MOST_KEYS, 8 + 4 + 1, width="<Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text("the name of a key", _LONGEST_KEY)
            if key in metadata:
                raise self._damaged(f"{key} is stated twice")
            metadata[key] = self._value(self._number("<I", key), key)
        return GgufHeader(self._path, metadata, self._tensors(tensors, self._alignment(metadata)))

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not 0 < value <= _LARGEST_ALIGNMENT or value & (value - 1):
            raise self._damaged(f"general.alignment is {value!r:.60}, not a power of two up to {_LARGEST_ALIGNMENT}")
        return value

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY:
            return self._scalars(kind, 1, key)[0].item()
        kind = self._number("<I", key)
        if kind == _STRING:
            return [self._text(key) for _ in range(self._count(key, _MOST_STRINGS, 8, width="<Q"))]
        return self._scalars(kind, self._number("<Q", key), key)

    def _scalars(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise self._damaged(f"{key} has values of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorEntry]:
        listed = [self._tensor() for _ in range(count)]
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        end, last = start, "the header"
        for name, shape, kind, offset in sorted(listed, key=lambda entry: entry[3]):
            size = self._bytes_of(name, shape, kind)
            if name in tensors:
                raise self._damaged(f"it has two tensors named {name}")
            if start + offset < end:
                raise self._damaged(f"{name} begins within {last}")
            end, last = start + offset + size, name
            if offset % alignment or end > len(self._data):
                raise self._damaged(f"{name} should end at byte {end}, but the file has {len(self._data)}")
            tensors[name] = TensorEntry(name, shape, kind, start + offset, size)
        return {name: tensors[name] for name, *_ in listed}

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text("the name of a tensor", _LONGEST_NAME)
        dimensions = self._number("<I", name)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions, not 1 to {_MOST_DIMENSIONS}")
        shape = tuple(self._number("<Q", name) for _ in range(dimensions))[::-1]
        return name, shape, self._number("<I", name), self._number("<Q", name)

    def _bytes_of(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in {entry.value for entry in GGMLQuantizationType}:
            raise self._damaged(f"{name} has the unknown type {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if min(shape) < 1 or shape[-1] % block:
            raise self._damaged(f"{name} has the shape {list(shape)}, which is not rows of {block} weights")
        count: int = math.prod(shape) // block * size
        return count

    def _text(self, of: str, longest: int | None = None) -> str:
        length = self._number("<Q", of)
        if longest is not None and length > longest:
            raise self._damaged(f"{of} has {length} bytes, more than {longest}")
        try:
            return self._take(length, of).decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{of} is not UTF-8") from None

    def _count(self, of: str, most: int, least_bytes: int, *, width: str) -> int:
        """Read a count of things that have at least `least_bytes` each."""
        count = self._number(width, of)
        if count > most or count * least_bytes > len(self._data) - self._at:
            raise self._damaged(f"{of}: {count} entries are stated, more than the file holds")
        return count

    def _number(self, layout: str, of: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout), of))[0]
        return value

    def _take(self, length: int, of: str) -> bytes:
        if length > len(self._data) - self._at:
            raise self._damaged(f"{of} ends after the file's {len(self._data)} bytes")
        self._at += length
        return self._data[self._at - length : self._at]

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._path.name}: {what:.300}", DAMAGED)
