"""Find the files that a graph takes its weights from: a reader of ONNX's protobuf that follows only the paths to them.

Every byte is visited at most once, weights inside the graph are skipped, and nothing is allocated by a number from the
file.

ONNX Runtime 1.32 refuses external data outside the model's folder by itself. Tried with 8 places of a tensor
(initializer, sparse initializer, attributes of Constant and ConstantOfShape, sparse attribute, subgraph, Constant in a
subgraph, Constant in a function) and 13 locations: absolute paths outside and inside, `..`, `sub/../..`, a sibling
folder with the same prefix, a link, a chain of links, a folder that is a link, /dev/zero, /proc/self/environ, the tag
for memory addresses, no location, an empty one; with a graph that is a link, one loaded from bytes, and offsets and
lengths beyond the file. None was read. It does read files of the folder that the manifest does not list, and it cuts a
location at a NUL character. This reader stays because more than safety needs it: `verify` refuses unlisted files, the
writer drops files that no graph refers to, and .sparse files are packed and expanded by the tensors' places.
"""

from __future__ import annotations

import mmap
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from edgemix.bundle.paths import resolve
from edgemix.bundle.protobuf import MalformedError, field, fields
from edgemix.bundle.sparse_storage import SUFFIX, read_header
from edgemix.errors import EXPORT_AGAIN, BundleError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_GRAPH_BYTES = (1 << 31) - 1
"""Protobuf's own limit for a message."""
MAX_DEPTH = 100
"""Protobuf's own limit for messages in messages; a graph in a graph takes three."""
MAX_FIELDS = 2_000_000
"""A graph of a thousand layers has some hundred thousand; more would only keep the reader busy."""

# Message of onnx.proto -> number of each field that leads to a tensor -> that field's message.
_WAYS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {},
}
_LONGEST_ENTRY = 4096
_KEYS = frozenset({"location", "offset", "length", "checksum"})


class ExternalTensor(NamedTuple):
    """Where one tensor's bytes lie: a file relative to the graph's folder, and the part of it, in bytes.

    The file may be stored as LOCATION.sparse: then the place is in what that expands to.
    """

    location: str
    offset: int
    length: int


def external_files(graph: Path) -> frozenset[str]:
    """Return the files that a graph takes weights from, relative to its folder, as they are stored.

    Raises:
        BundleError: See `external_tensors`.
    """
    return frozenset(location_as_stored(graph, tensor.location) for tensor in external_tensors(graph))


def location_as_stored(graph: Path, location: str) -> str:
    """Return the name of the file, plain or .sparse, that holds what a graph takes from a location."""
    return location if (graph.parent / location).is_file() else location + SUFFIX


def external_tensors(graph: Path) -> Iterator[ExternalTensor]:
    """Yield every tensor that is stored outside a graph: initializers, sparse ones, attributes, in all subgraphs and
    functions.

    Raises:
        BundleError: The file is no ONNX model, or a tensor's file is missing, outside the graph's folder, or shorter
            than the tensor's place in it.
    """
    sizes: dict[str, int] = {}
    with opened_graph(graph) as data:
        for entries in _external_entries(data):
            yield place_of(graph, entries, sizes)


@contextmanager
def opened_graph(graph: Path) -> Iterator[mmap.mmap]:
    """Map a graph into memory, and turn a MalformedError within the block into one of the bundle.

    Raises:
        BundleError: The file is no ONNX model.
    """
    with storage_errors(f"reading {graph}"):
        status = graph.stat()
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= MAX_GRAPH_BYTES:
            raise BundleError(f"{graph}: is no ONNX model (it has {status.st_size:,} bytes)")
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                yield data
            except MalformedError as error:
                raise BundleError(f"{graph}: is no sound ONNX model: {error}", "Export the bundle again.") from None


def place_of(graph: Path, entries: dict[str, str], sizes: dict[str, int]) -> ExternalTensor:
    """Return where a tensor lies by its entries, after checking that it lies there.

    Args:
        graph: The graph's file.
        entries: The tensor's external data.
        sizes: Location -> bytes, of what was looked up before; it is added to.

    Raises:
        MalformedError: The entries are no place.
        BundleError: The file is missing, outside the graph's folder, or shorter.
    """
    if "location" not in entries:
        raise MalformedError("a tensor's external data has no location")
    location = entries["location"]
    if location not in sizes:
        sizes[location] = _size(graph, location)
    offset = _natural(entries.get("offset", "0"))
    length = _natural(entries["length"]) if "length" in entries else sizes[location] - offset
    if length < 0 or offset + length > sizes[location]:
        raise BundleError(
            f"{graph}: a tensor at bytes {offset:,} to {offset + length:,} of {location!r}, which has "
            f"{sizes[location]:,}",
            EXPORT_AGAIN,
        )
    return ExternalTensor(location, offset, length)


def _size(graph: Path, location: str) -> int:
    """Return the size in bytes of an external data file, or of what its .sparse file expands to."""
    path, packed = (resolve(graph.parent, name) for name in (location, location + SUFFIX))
    if path.is_file():
        return path.stat().st_size
    if not packed.is_file():
        raise BundleError(f"{graph}: its weights in {location!r} are missing")
    return read_header(packed).size


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise MalformedError(f"a tensor's place in its file is {text[:80]!r}, not a number of bytes")
    return int(text)


def _external_entries(data: mmap.mmap) -> Iterator[dict[str, str]]:
    """Yield the external data entries of each tensor that has some, unchecked."""
    # A stack of open messages: kind, end, and for a tensor what was found in it.
    stack: list[tuple[str, int, dict[str, str]]] = [("ModelProto", len(data), {})]
    position, seen = 0, 0
    while stack:
        kind, end, found = stack[-1]
        if position == end:
            stack.pop()
            if kind == "TensorProto" and found:
                yield found
            continue
        seen += 1
        if seen > MAX_FIELDS:
            raise MalformedError(f"it has more than {MAX_FIELDS:,} fields")
        number, _, start, position = field(data, position, end)
        inner = _WAYS[kind].get(number)
        if start is None or inner is None:
            continue
        if inner == "StringStringEntryProto":
            read_entry(data, start, position, found)
        else:
            if len(stack) == MAX_DEPTH:
                raise MalformedError(f"it nests messages more than {MAX_DEPTH} deep")
            stack.append((inner, position, {}))
            position = start


def read_entry(data: mmap.mmap, position: int, end: int, found: dict[str, str]) -> None:
    """Decode a key of a tensor's external data and its value, and add them to those that were found before.

    Raises:
        MalformedError: There is no such key, or it was found before.
    """
    texts: dict[int, str] = {}
    if end - position > _LONGEST_ENTRY:
        raise MalformedError("a tensor's external data has an entry that is too long")
    for number, _, start, stop in fields(data, position, end):
        if start is None or number not in (1, 2):
            continue
        if number in texts:
            raise MalformedError("a tensor's external data has an entry with a repeated part")
        try:
            texts[number] = data[start:stop].decode()
        except UnicodeDecodeError:
            raise MalformedError("a tensor's external data is no UTF-8") from None
    key = texts.get(1, "")
    if key in found or key not in _KEYS:
        problem = "the unknown key" if key not in found else "twice the key"
        raise MalformedError(f"a tensor's external data has {problem} {key[:80]!r}")
    found[key] = texts.get(2, "")
