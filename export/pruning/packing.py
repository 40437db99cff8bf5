"""Write a graph's weights without their zeros, in the format of `edgemix.bundle.sparse_storage`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from edgemix.bundle.external_data import external_tensors
from edgemix.bundle.manifest import SparseWeights
from edgemix.bundle.sparse_storage import (
    MAX_RATIO,
    PLANES,
    SUFFIX,
    WORTH_A_MASK,
    Segment,
    ZeroPoints,
    deflate,
    write_header,
)
from edgemix.errors import EdgemixError, storage_errors
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.graphs.sparse_weights import expand

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Elements: TypeAlias = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class _Encoding:
    """How a tensor's zeros are stored.

    Attributes:
        width: Bits per element.
        background: Stored value of a zero weight; None for the most frequent value.
        zero_points: For zeros that are stored as their block's zero point: the offset of the zero points' tensor,
            elements per block, and elements per row.
    """

    width: int
    background: int | None = None
    zero_points: tuple[int, int, int] | None = None


def pack_weights(graph: Path, progress: Progress = NO_PROGRESS) -> SparseWeights | None:
    """Replace a graph's external data file by a .sparse file if that is smaller.

    Args:
        graph: The .onnx file; all of its external data must be in one file beside it.
        progress: Progress callback.

    Returns:
        The manifest's entry; None if the weights stay uncompressed because nothing would be gained.

    Raises:
        EdgemixError: The file does not expand to the same bytes (the weights are then kept), or cannot be written.
    """
    tensors = sorted(set(external_tensors(graph)), key=lambda tensor: tensor.offset)
    locations = {tensor.location for tensor in tensors}
    if len(locations) != 1:
        return None
    data_file = graph.parent / locations.pop()
    packed, partial = (data_file.with_name(f"{data_file.name}{suffix}") for suffix in (SUFFIX, f"{SUFFIX}.partial"))
    ends = [0, *(tensor.offset + tensor.length for tensor in tensors)]
    with storage_errors(f"writing {packed}"), progress.stage("pack zeros", data_file.stat().st_size) as task:
        content = np.fromfile(data_file, np.uint8)
        if any(tensor.offset < end for tensor, end in zip(tensors, ends, strict=False)) or ends[-1] != len(content):
            return None  # tensors that share bytes, or bytes of no tensor: not a graph that edgemix wrote
        encodings = _encodings(ir.load(graph).graph)
        numbers = {tensor.offset: number for number, tensor in enumerate(tensors) if tensor.length}
        segments, streams = [], []
        for tensor in tensors:
            if tensor.length:
                part = content[tensor.offset : tensor.offset + tensor.length]
                encoding = encodings.get(tensor.offset, _Encoding(8))
                segment, parts = _pack_tensor(part, tensor.offset, encoding, content, numbers)
                segments.append(segment)
                streams.append(parts)
                task.advance(tensor.length)
        header = write_header(len(content), segments)
        size = len(header) + sum(segment.stored for segment in segments)
        if not len(content) / MAX_RATIO <= size < len(content):
            return None
        with partial.open("wb") as file:
            file.writelines([header, *(stream for parts in streams for stream in parts)])
        if not np.array_equal(expand(partial), content):
            partial.unlink()
            raise EdgemixError(f"{packed}: does not expand to the weights that were packed", "Please report this.")
        partial.replace(packed)
        data_file.unlink()
    return SparseWeights(size=len(content))


def _encodings(graph: ir.Graph) -> dict[int, _Encoding]:
    """Return tensors' encodings by offset: the width from their type, the background from the nodes that read them."""
    encodings, offsets = {}, {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            offset = offsets[value] = tensor.offset or 0
            if tensor.dtype.bitwidth in PLANES:
                encodings[offset] = _Encoding(tensor.dtype.bitwidth, 0 if tensor.dtype.is_floating_point() else None)
    for node in graph:
        codes = node.inputs[1] if node.op_type == "MatMulNBits" else None
        bits = node.attributes.get_int("bits", 4)
        if codes is None or codes not in offsets or bits not in (4, 8):
            continue
        zeros = node.inputs[3] if len(node.inputs) > 3 else None
        zero_points = None
        if zeros is not None:
            if zeros not in offsets or zeros.dtype != ir.DataType.UINT8:
                continue
            block = node.attributes.get_int("block_size", 32)
            zero_points = offsets[zeros], block, codes.const_value.shape[1] * block
        encodings[offsets[codes]] = _Encoding(bits, 1 << (bits - 1), zero_points)
    return encodings


def _pack_tensor(
    content: NDArray[np.uint8], offset: int, encoding: _Encoding, file: NDArray[np.uint8], numbers: dict[int, int]
) -> tuple[Segment, list[bytes]]:
    """Return a tensor's segment and its streams: the mask if there is one, then the planes."""
    elements = _elements(content, encoding.width)
    zero_points, background = None, encoding.background
    if encoding.zero_points is not None:
        zeros, block, row = encoding.zero_points
        zero_points = ZeroPoints(numbers[zeros], block, row)
        rows = len(elements) // row
        packed = file[zeros : zeros + rows * ((row // block * encoding.width + 7) // 8)]
        points = _elements(packed, encoding.width).reshape(rows, -1)[:, : row // block]
        differences = elements - np.repeat(points.ravel(), block)
    else:
        background = _most_frequent(elements) if background is None else background
        differences = elements - elements.dtype.type(background)
    if encoding.width == 4:
        differences &= 15
    present = differences != 0
    if present.mean() <= 1 - WORTH_A_MASK:
        mask = deflate(np.packbits(present).tobytes())
        differences = differences[present]
    else:
        mask = b""
    planes = [deflate(plane.tobytes()) for plane in _planes(differences, encoding.width)]
    segment = Segment(
        offset, len(content), encoding.width, background or 0, len(mask), tuple(map(len, planes)), zero_points
    )
    return segment, [mask, *planes]


def _elements(content: NDArray[np.uint8], width: int) -> Elements:
    if width == 4:
        return np.stack([content & 15, content >> 4], axis=-1).ravel()
    elements: Elements = content.view(f"<u{width // 8}")
    return elements


def _planes(values: Elements, width: int) -> list[NDArray[np.uint8]]:
    """Return the values' byte planes, lowest byte first; two 4-bit values share a byte."""
    if width == 4:
        padded = np.pad(values, (0, len(values) % 2)).astype(np.uint8)
        return [padded[::2] | (padded[1::2] << np.uint8(4))]
    return list(np.ascontiguousarray(values).view(np.uint8).reshape(-1, width // 8).T)


def _most_frequent(elements: Elements) -> int:
    if elements.itemsize == 1:
        return int(np.bincount(elements, minlength=1).argmax())
    return 0
