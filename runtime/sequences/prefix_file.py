"""Texts that were read, in a file: the next run of an app goes on with them.

A magic line, a line of JSON (`_Header`), then for every text its token ids (int64), its members' log-probabilities
(float64 [members, tokens]) and its key-value state (slot after slot, [heads, tokens, head_size]), all little-endian.
How many bytes that takes follows from the graph, and is compared before any of them is read. A damaged text is refused;
but whoever can write the file decides what the graphs have read.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from edgemix.bundle.reader import graph_digest
from edgemix.errors import InputError, storage_errors
from edgemix.files import write_atomically
from edgemix.runtime.sequences.prefix_cache import PrefixEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest
    from edgemix.runtime.graphs.decoder import DecoderGraph
    from edgemix.runtime.sequences.prefix_cache import PrefixCache

_MAGIC = b"edgemix texts that were read, 1\n"
_LONGEST_HEADER = 16 << 20
_MOST_TEXTS = 4_000
"""Whose header is within that length; the least recently used ones are left out."""


class _Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One text of one graph, and the sha256 of its bytes."""

    graph: str
    tokens: int
    bytes: int
    sha256: str


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What follows, the least recently used text first; and the messages of a session."""

    texts: tuple[_Text, ...]
    messages: tuple[dict[str, Any], ...] = ()


def write(
    path: Path,
    prefixes: PrefixCache,
    manifest: Manifest,
    members: Sequence[DecoderGraph],
    messages: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write down what is kept.

    Args:
        path: The file; one that is there is replaced.
        prefixes: What is kept.
        manifest: The bundle's.
        members: Its graphs.
        messages: Of the session whose texts these are.

    Raises:
        InputError: A message is not JSON, or there are more of them than a file can have.
        EdgemixError: It cannot be written; an old file is untouched.
    """
    names = {id(graph): name for name, graph in _named(manifest, members).items()}
    texts, content = [], []
    for kept in [*prefixes.each()][-_MOST_TEXTS:]:
        arrays = (kept.text, kept.own, *kept.cache.state(len(kept.text)))
        data = b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays)
        texts.append(_Text(names[kept.graph], len(kept.text), len(data), hashlib.sha256(data).hexdigest()))
        content.append(data)
    try:
        plain = tuple(map(dict, messages))
        header = msgspec.json.encode(_Header(tuple(texts), plain))
        same = msgspec.json.decode(header, type=_Header).messages == plain
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages cannot be written down: {error}") from None
    if not same:
        raise InputError("the messages cannot be written down: they hold what is not JSON")
    if len(header) >= _LONGEST_HEADER:
        raise InputError(f"the messages are longer than {_LONGEST_HEADER >> 20} MiB")
    write_atomically(path, b"".join([_MAGIC, header, b"\n", *content]))


def read(
    path: Path, prefixes: PrefixCache, manifest: Manifest, members: Sequence[DecoderGraph]
) -> tuple[int, tuple[dict[str, Any], ...]]:
    """Keep what a file has, as far as there is room; texts of graphs that are not here are passed over.

    Args:
        path: The file.
        prefixes: What is kept.
        manifest: The bundle's.
        members: Its graphs.

    Returns:
        How many texts it had of these graphs, and the messages of the session whose texts they are.

    Raises:
        InputError: There is no such file, or it is damaged.
        EdgemixError: It cannot be read.
    """
    graphs = _named(manifest, members)
    with storage_errors(f"reading {path}"):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise InputError(f"there is no file {path}") from None
        with file:
            begin, line = file.readline(len(_MAGIC)), file.readline(_LONGEST_HEADER)
            if begin != _MAGIC:
                raise InputError(f"{path} is no file of texts that edgemix has read")
            header = _header(line, path)
            texts = header.texts
            if any(text.bytes < 0 for text in texts) or file.tell() + sum(t.bytes for t in texts) != _size(file):
                raise _damaged(path)
            found = 0
            for text in texts:
                graph = graphs.get(text.graph)
                if graph is None:
                    file.seek(text.bytes, os.SEEK_CUR)
                    continue
                fields = _fields(graph, text.tokens)
                if not 0 < text.tokens <= graph.context or text.bytes != sum(field.nbytes for field in fields):
                    raise _damaged(path)
                data = file.read(text.bytes)
                if hashlib.sha256(data).hexdigest() != text.sha256:
                    raise _damaged(path)
                prefixes.add(_kept(data, fields, graph, manifest.tokenizer.vocabulary, path))
                found += 1
    return found, header.messages


def _named(manifest: Manifest, members: Sequence[DecoderGraph]) -> dict[str, DecoderGraph]:
    """Each graph by the checksum of its files."""
    graphs = dict.fromkeys(entry.graph for entry in manifest.members)
    return dict(zip((graph_digest(manifest, graph) for graph in graphs), members, strict=True))


class _Field(NamedTuple):
    """One array of a text."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def _fields(graph: DecoderGraph, tokens: int) -> list[_Field]:
    """What a text of so many tokens is made of."""
    layout = graph.layout
    state = [_Field(layout.dtype, (slot.heads, tokens, slot.head_size)) for slot in layout.slots]
    return [
        _Field(np.dtype(np.int64), (tokens,)),
        _Field(np.dtype(np.float64), (graph.member_count, tokens)),
        *state,
    ]


def _header(line: bytes, path: Path) -> _Header:
    try:
        return msgspec.json.decode(line, type=_Header)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _damaged(path) from None


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _kept(data: bytes, fields: Sequence[_Field], graph: DecoderGraph, vocabulary: int, path: Path) -> PrefixEntry:
    arrays, place = [], 0
    for field in fields:
        flat = np.frombuffer(data, field.dtype.newbyteorder("<"), math.prod(field.shape), place)
        arrays.append(flat.reshape(field.shape).astype(field.dtype))
        place += field.nbytes
    ids, own, *state = arrays
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise _damaged(path)
    return PrefixEntry(id(graph), ids, graph.new_cache().holding(graph.layout, state), own)


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged", "Delete it; it is written anew.")
