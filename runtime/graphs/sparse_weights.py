"""Weights stored without their zeros, expanded in memory (the format: `edgemix.bundle.sparse_storage`)."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgemix.bundle.external_data import external_tensors
from edgemix.bundle.sparse_storage import SUFFIX, Index, Segment, inflate, plane_bytes, read_index
from edgemix.errors import EXPORT_AGAIN, BundleError, storage_errors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Elements: TypeAlias = NDArray[np.unsignedinteger[Any]]

_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("u1"), 8: np.dtype("u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4")}
"""The dtype of an element, by its bits, while its segment is expanded."""


def expanded_files(graph: Path) -> dict[str, Bytes]:
    """Return the external data files of a graph that are stored as .sparse files: location -> the file's bytes.

    Raises:
        BundleError: One is damaged, or stands for more bytes than the graph's tensors have.
    """
    if not any(graph.parent.glob(f"*{SUFFIX}")):
        return {}
    ends: dict[str, int] = {}
    for tensor in external_tensors(graph):
        ends[tensor.location] = max(ends.get(tensor.location, 0), tensor.offset + tensor.length)
    files = {}
    for location, end in ends.items():
        if not (graph.parent / location).is_file():
            path = graph.parent / f"{location}{SUFFIX}"
            index = read_index(path)
            if index.size != end:
                raise BundleError(
                    f"{path}: would become {index.size:,} bytes, and the tensors of {graph.name} end at byte {end:,}",
                    EXPORT_AGAIN,
                )
            files[location] = expand(path, index)
    return files


def expand(path: Path, index: Index | None = None) -> Bytes:
    """Return the file that a .sparse file stands for, uint8 [size].

    Beside the result, memory is needed for one tensor at a time, a byte or two for each of its elements.

    Raises:
        BundleError: The file is damaged.
    """
    index = index or read_index(path)
    content = np.zeros(index.size, np.uint8)
    # Zero points first: other segments are differences from them.
    order = sorted(range(len(index.segments)), key=lambda number: index.segments[number].zero_points is not None)
    starts = np.cumsum([index.start, *(segment.stored for segment in index.segments)]).tolist()
    with (
        storage_errors(f"reading {path}"),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        for number in order:
            segment = index.segments[number]
            try:
                differences = _differences(segment, data, starts[number])
            except ValueError as error:
                raise BundleError(f"{path}: segment {number} is damaged: {error}", EXPORT_AGAIN) from None
            elements = differences + _background(segment, index, content)
            place = content[segment.offset : segment.offset + segment.length]
            place[:] = _to_nibbles(elements) if segment.width == 4 else elements.view(np.uint8)
    return content


def _differences(segment: Segment, data: mmap.mmap, start: int) -> Elements:
    """Return the elements of a segment, zeros included: [elements]."""
    mask = None
    count = segment.elements
    if segment.mask:
        packed = np.frombuffer(inflate(data[start : start + segment.mask], (count + 7) // 8), np.uint8)
        bits = np.unpackbits(packed)
        mask = bits[:count].view(np.bool_)
        if bits[count:].any():
            raise ValueError("its mask is longer than it")
        count = int(mask.sum())
    start += segment.mask
    planes = []
    for stored in segment.values:
        planes.append(np.frombuffer(inflate(data[start : start + stored], plane_bytes(segment.width, count)), np.uint8))
        start += stored
    values = _values(segment.width, planes)[:count]
    if mask is None:
        return values
    differences = np.zeros(segment.elements, values.dtype)
    differences[mask] = values
    return differences


def _values(width: int, planes: list[Bytes]) -> Elements:
    """Return values from their bytes: two of 4 bits in a byte, or a plane for each byte, the lowest first."""
    if width == 4:
        return np.stack([planes[0] & 15, planes[0] >> 4], axis=1).ravel()
    values: Elements = np.stack(planes, axis=1).ravel().view(_DTYPES[width])
    return values


def _background(segment: Segment, index: Index, content: Bytes) -> Elements:
    """Return the base of the differences: one number, or each element's zero point."""
    places = segment.zero_points
    if places is None:
        return np.array(segment.background, _DTYPES[segment.width])
    holder = index.segments[places.segment]
    packed = content[holder.offset : holder.offset + holder.length].reshape(segment.elements // places.row, -1)
    if segment.width == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.repeat(packed[:, : places.row // places.block].ravel(), places.block)


def _to_nibbles(elements: Elements) -> Bytes:
    return ((elements[::2] & 15) | (elements[1::2] << 4)).astype(np.uint8, copy=False)
