"""The format of a .sparse file: a graph's external data file with many zeros, stored compactly.

    model.onnx.data.sparse
      header      MAGIC, size of the file it stands for, size of the index (little-endian)
      index       JSON: a `Segment` for each tensor, in the order of their places
      streams     the segments' streams, one after the other

A segment's elements are numbers of `width` bits, stored as differences (modulo 2^width) from a background: a constant,
or for quantized blocks their zero points, so that a weight of zero is a difference of zero in every format. A mask has
a bit for each element, set where the difference is not zero; only those differences are stored, in planes of bytes.
Mask and planes are streams of raw deflate, most of them coded by Huffman alone: weights do not repeat, their values
are only unevenly frequent. Measured on SmolLM2-135M's layers, half of the weights zero: within 1% of the entropy.

Plain compression of the weights is larger. Measured on normally distributed weights of 1024 x 2048, half of them zero
(anywhere / 2:4), against this format: zlib level 9 of fp16 +18% / +18%, int8 +15% / +25%, int4 in blocks of 32 +9% /
+17%; zstd level 19, which would be a dependency, fp16 +10% / +11%, int8 +1% / +8%, int4 +1% / +12%.

What stands between segments is zero. Nothing is allocated by a number that was not checked: sizes must fit each other,
and no file may stand for more than `MAX_RATIO` times its own size.
"""

from __future__ import annotations

import stat
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edgemix.errors import EXPORT_AGAIN, BundleError, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SUFFIX = ".sparse"
MAGIC = b"emixsp01"
HEADER = struct.Struct("<8sQQ")
MAX_RATIO = 64
"""Weights of 32 bits with 95% zeros shrink by a factor of 17; a file that grows more than this is no model."""
MAX_INDEX_BYTES = 16 << 20
MAX_SEGMENTS = 1 << 16
"""A segment is a tensor; of the largest models' there are a few thousand."""
WORTH_A_MASK = 1 / 8
"""Share of zeros from which they are left out; fewer cost less as frequent values than as bits of a mask."""
PLANES = {4: 1, 8: 1, 16: 2, 32: 4}
"""Width of an element in bits -> number of streams for its values: a byte each, and two elements of 4 bits in one."""


class ZeroPoints(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A background that changes from block to block.

    Attributes:
        segment: The segment that holds the zero points, as wide as the elements: for each row of blocks a whole number
            of bytes, the lower bits first, as MatMulNBits reads them.
        block: Elements with one zero point.
        row: Elements in a row.
    """

    segment: int
    block: int
    row: int


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of the file.

    Attributes:
        offset: Where it begins in the file, in bytes; `length` how many it has there.
        width: Bits of an element: 4, 8, 16 or 32.
        background: What the differences are from.
        mask: Stored bytes of the mask; 0 if there is none, as all elements are stored.
        values: Stored bytes of each plane.
        zero_points: In the place of `background` where it changes.
    """

    offset: int
    length: int
    width: int
    background: int
    mask: int
    values: tuple[int, ...]
    zero_points: ZeroPoints | None = None

    @property
    def elements(self) -> int:
        return self.length * 8 // self.width

    @property
    def stored(self) -> int:
        """Bytes of all its streams."""
        return self.mask + sum(self.values)


class Header(NamedTuple):
    """What a .sparse file begins with: the size of the file it stands for, and that of its index, in bytes."""

    size: int
    index_bytes: int


class Index(NamedTuple):
    """A checked index: the size of the file it stands for, its segments, and where their streams begin."""

    size: int
    segments: tuple[Segment, ...]
    start: int


def read_header(path: Path) -> Header:
    """Read the sizes in a .sparse file's header, and check that they are possible.

    Raises:
        BundleError: It is no such file, or stands for a file that is far too large.
    """
    with storage_errors(f"reading {path}"):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            data = file.read(HEADER.size)
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise BundleError(f"{path}: is no file of sparse weights", EXPORT_AGAIN)
    _, size, index = HEADER.unpack(data)
    if not 0 < size <= MAX_RATIO * status.st_size:
        raise BundleError(
            f"{path}: {status.st_size:,} bytes that would become {size:,}; no model shrinks so much",
            "Do not use this bundle.",
        )
    if index > min(MAX_INDEX_BYTES, status.st_size - HEADER.size):
        raise BundleError(f"{path}: its index of {index:,} bytes is longer than it may be", EXPORT_AGAIN)
    return Header(size, index)


def read_index(path: Path) -> Index:
    """Read and check the index of a .sparse file: afterwards every number in it can be relied on.

    Raises:
        BundleError: It is damaged or contradicts itself.
    """
    header = read_header(path)
    start = HEADER.size + header.index_bytes
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        file.seek(HEADER.size)
        data = file.read(header.index_bytes)
        available = path.stat().st_size - start
    try:
        segments = msgspec.json.decode(data, type=tuple[Segment, ...])
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{path}: its index is damaged: {error}", EXPORT_AGAIN) from None
    if reason := next(_errors(header.size, segments, available), None):
        raise BundleError(f"{path}: its index contradicts itself: {reason}", EXPORT_AGAIN)
    return Index(header.size, segments, start)


def inflate(stored: bytes, size: int) -> bytes:
    """Decompress a stream to exactly `size` bytes; what deflate cannot shrink is stored as it is.

    Raises:
        ValueError: The stream is damaged, or holds more or fewer bytes.
    """
    if len(stored) == size:
        return stored
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(stored, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(content) != size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"a stream has not the {size:,} bytes that it should have")
    return content


def deflate(content: bytes) -> bytes:
    """Compress `content` to the smallest stream."""
    streams = [content]
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        streams.append(deflater.compress(content) + deflater.flush())
    return min(streams, key=len)


def plane_bytes(width: int, count: int) -> int:
    """Return the size in bytes of each plane of `count` values."""
    return (count + 1) // 2 if width == 4 else count


def write_header(size: int, segments: Sequence[Segment]) -> bytes:
    """Encode header and index; the segments' streams follow them."""
    index = msgspec.json.encode(segments)
    return HEADER.pack(MAGIC, size, len(index)) + index


def _errors(size: int, segments: Sequence[Segment], available: int) -> Iterator[str]:
    if len(segments) > MAX_SEGMENTS:
        yield f"it has {len(segments):,} segments, and may have {MAX_SEGMENTS:,}"
    end = 0
    for number, segment in enumerate(segments):
        where = f"segment {number}"
        if segment.offset < end or segment.length <= 0 or segment.offset + segment.length > size:
            yield f"{where} lies at bytes {segment.offset:,} to {segment.offset + segment.length:,}"
        end = segment.offset + segment.length
        if segment.width not in PLANES or segment.length * 8 % segment.width:
            yield f"{where} has elements of {segment.width} bits in {segment.length:,} bytes"
        elif len(segment.values) != PLANES[segment.width] or min(segment.mask, *segment.values) < 0:
            yield f"{where} has streams that do not fit its width"
        elif not 0 <= segment.background < 1 << segment.width:
            yield f"{where} has the background {segment.background}"
        elif segment.zero_points is not None and not _fits(segment, segment.zero_points, segments):
            yield f"{where} has zero points that do not fit"
    if (stored := sum(segment.stored for segment in segments)) != available:
        yield f"its streams have {stored:,} bytes, and {available:,} are there"


def _fits(segment: Segment, places: ZeroPoints, segments: Sequence[Segment]) -> bool:
    if not 0 <= places.segment < len(segments) or not 0 < places.block <= places.row <= segment.elements:
        return False
    if places.row % places.block or segment.elements % places.row:
        return False
    holder = segments[places.segment]
    row_bytes = (places.row // places.block * segment.width + 7) // 8
    return (
        segment.width in (4, 8)
        and holder.zero_points is None
        and holder.length == segment.elements // places.row * row_bytes
    )
