"""Prefix caches and sessions as safetensors files, for another process.

Text number i has the tensors `i.tokens` (int64 [tokens]), `i.log_probabilities` (float64 [members, tokens]) and
`i.state.j` ([heads, tokens, head_size]) for slot j of its graph's key-value cache. The metadata hold the messages of a
session, each text's graph, and checksums. Counts, shapes and values are checked: a damaged file is refused. But whoever
can write the file decides what the graphs have read.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgemix.bundle.reader import graph_digest
from edgemix.errors import InputError, storage_errors
from edgemix.files import write_atomically
from edgemix.runtime.sequences.prefix_cache import PrefixEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.manifest import Manifest
    from edgemix.runtime.graphs.decoder import DecoderGraph
    from edgemix.runtime.sequences.prefix_cache import PrefixCache

_OLD_MAGIC = b"edgemix texts that were read, 1\n"
_MAX_HEADER_BYTES = 16 << 20
_MAX_TEXTS = 1_000
"""With more, the names of their tensors would exceed safetensors' limit; the least recently used texts are left out."""

_ROUNDING = 1e-6
"""Most that rounding adds to a log-probability, which is at most 0."""


class _Text(msgspec.Struct, frozen=True):
    """One text: the digest of the graph that read it, and the sha256 of its tensors."""

    graph: str
    sha256: str


class _Header(msgspec.Struct, frozen=True):
    """The texts, the least recently used one first; and the messages of a session."""

    texts: tuple[_Text, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()


def write(
    path: Path,
    prefixes: PrefixCache,
    manifest: Manifest,
    graphs: Sequence[DecoderGraph],
    messages: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the entries of a prefix cache.

    Args:
        path: The file; an existing one is replaced.
        prefixes: The cache.
        manifest: The bundle's.
        graphs: The bundle's.
        messages: Those of the session whose cache it is.

    Raises:
        InputError: A message is not JSON, or the messages are too long.
        EdgemixError: The file cannot be written; an old one is untouched.
    """
    from safetensors.numpy import save

    digests = {id(graph): digest for digest, graph in _by_digest(manifest, graphs).items()}
    texts: list[_Text] = []
    tensors: dict[str, NDArray[Any]] = {}
    for number, entry in enumerate([*prefixes.each()][-_MAX_TEXTS:]):
        arrays = [entry.text, entry.log_probabilities, *entry.cache.state(len(entry.text))]
        texts.append(_Text(digests[entry.graph], _sha256(arrays)))
        tensors |= dict(zip(_names(number, len(arrays) - 2), arrays, strict=True))
    header = _encode(_Header(tuple(texts), tuple(map(dict, messages))))
    metadata = {"edgemix": header.decode(), "sha256": hashlib.sha256(header).hexdigest()}
    write_atomically(path, save(tensors, metadata))


def read(
    path: Path, prefixes: PrefixCache, manifest: Manifest, graphs: Sequence[DecoderGraph]
) -> tuple[int, tuple[dict[str, Any], ...]]:
    """Add a file's texts to a prefix cache, as far as there is room; texts of other graphs are skipped.

    Returns:
        The number of texts of these graphs, and the session's messages. A file of edgemix's first format gives its
        messages alone.

    Raises:
        InputError: There is no such file, or it is damaged.
        EdgemixError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    by_digest, found = _by_digest(manifest, graphs), 0
    with storage_errors(f"reading {path}"):
        try:
            with path.open("rb") as file:
                if file.read(len(_OLD_MAGIC)) == _OLD_MAGIC:
                    return 0, _decode(file.readline(_MAX_HEADER_BYTES), path).messages
            with safe_open(path, framework="np") as file:
                header = _checked_header(file.metadata() or {}, path)
                for number, text in enumerate(header.texts):
                    if (graph := by_digest.get(text.graph)) is not None:
                        names = _names(number, len(graph.layout.slots))
                        arrays = [file.get_tensor(name) for name in names]
                        if _sha256(arrays) != text.sha256:
                            raise _damaged(path)
                        prefixes.add(_entry(arrays, graph, manifest.vocabulary, path))
                        found += 1
        except FileNotFoundError:
            raise InputError(f"there is no file {path}") from None
        except SafetensorError:
            raise _damaged(path) from None
    return found, header.messages


def _names(number: int, slots: int) -> list[str]:
    """Return the names of a text's tensors."""
    return [f"{number}.tokens", f"{number}.log_probabilities", *(f"{number}.state.{slot}" for slot in range(slots))]


def _by_digest(manifest: Manifest, graphs: Sequence[DecoderGraph]) -> dict[str, DecoderGraph]:
    """Return each graph by the digest of its files."""
    paths = dict.fromkeys(entry.graph for entry in manifest.members)
    return dict(zip((graph_digest(manifest, path) for path in paths), graphs, strict=True))


def _sha256(arrays: Sequence[NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.name} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _encode(header: _Header) -> bytes:
    try:
        encoded = msgspec.json.encode(header)
        same = msgspec.json.decode(encoded, type=_Header).messages == header.messages
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages cannot be written down: {error}") from None
    if not same:
        raise InputError("the messages cannot be written down: they hold what is not JSON")
    if len(encoded) >= _MAX_HEADER_BYTES:
        raise InputError(f"the messages are longer than {_MAX_HEADER_BYTES >> 20} MiB")
    return encoded


def _checked_header(metadata: Mapping[str, str], path: Path) -> _Header:
    encoded = metadata.get("edgemix", "").encode()
    if len(encoded) >= _MAX_HEADER_BYTES:
        raise _damaged(path)
    if hashlib.sha256(encoded).hexdigest() != metadata.get("sha256"):
        raise _damaged(path)
    return _decode(encoded, path)


def _decode(encoded: bytes, path: Path) -> _Header:
    try:
        header = msgspec.json.decode(encoded, type=_Header)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _damaged(path) from None
    if len(header.texts) > _MAX_TEXTS:
        raise _damaged(path)
    return header


def _entry(arrays: Sequence[NDArray[Any]], graph: DecoderGraph, vocabulary: int, path: Path) -> PrefixEntry:
    """Return the cache entry of a text's arrays, whose shapes and values must be the graph's."""
    ids, log_probabilities, *state = arrays
    tokens, layout = len(ids) if ids.ndim == 1 else 0, graph.layout
    expected = [
        (np.dtype(np.int64), (tokens,)),
        (np.dtype(np.float64), (graph.member_count, tokens)),
        *((layout.dtype, (slot.heads, tokens, slot.head_size)) for slot in layout.slots),
    ]
    if not 0 < tokens <= graph.context or [(array.dtype, array.shape) for array in arrays] != expected:
        raise _damaged(path)
    if ids.min() < 0 or ids.max() >= vocabulary or not all(np.isfinite(array).all() for array in state):
        raise _damaged(path)
    if (log_probabilities > _ROUNDING).any():  # those that were not computed are NaN
        raise _damaged(path)
    return PrefixEntry(id(graph), ids, graph.new_cache().holding(layout, state), log_probabilities)


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged, or no file that edgemix wrote", "Delete it; it is written anew.")
