"""A graph's weights without their zeros, on disk: the writer of `edgemix.bundle.sparse_storage`'s format."""

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
class _Kind:
    """How a tensor's zeros look.

    Attributes:
        width: Bits of an element.
        background: What a weight of zero is stored as; None for the most frequent value.
        zero_points: Where the tensor lies whose elements are the background: its offset, and elements a block and a
            row.
    """

    width: int
    background: int | None = None
    zero_points: tuple[int, int, int] | None = None


def pack_weights(graph: Path, progress: Progress = NO_PROGRESS) -> SparseWeights | None:
    """Put a .sparse file in the place of a graph's external data file, if that is smaller.

    Args:
        graph: The .onnx file; all of its external data lies in one file beside it.
        progress: Hears of the bytes read.

    Returns:
        What the manifest says of it; None where the weights are stored plainly, as nothing would be gained.

    Raises:
        EdgemixError: What was written does not expand to the same bytes (nothing is lost then), or the disk refuses.
    """
    places = sorted(set(external_tensors(graph)), key=lambda tensor: tensor.offset)
    locations = {tensor.location for tensor in places}
    if len(locations) != 1:
        return None
    plain = graph.parent / locations.pop()
    packed, partial = (plain.with_name(f"{plain.name}{suffix}") for suffix in (SUFFIX, f"{SUFFIX}.partial"))
    ends = [0, *(tensor.offset + tensor.length for tensor in places)]
    with storage_errors(f"writing {packed}"), progress.stage("pack zeros", plain.stat().st_size) as task:
        content = np.fromfile(plain, np.uint8)
        if any(tensor.offset < end for tensor, end in zip(places, ends, strict=False)) or ends[-1] != len(content):
            return None  # tensors that share bytes, or bytes of no tensor: not a graph that edgemix wrote
        kinds = _kinds(ir.load(graph).graph)
        numbers = {tensor.offset: number for number, tensor in enumerate(places) if tensor.length}
        segments, streams = [], []
        for tensor in places:
            if tensor.length:
                part = content[tensor.offset : tensor.offset + tensor.length]
                kind = kinds.get(tensor.offset, _Kind(8))
                segment, parts = _pack(part, tensor.offset, kind, content, numbers)
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
        plain.unlink()
    return SparseWeights(size=len(content))


def _kinds(graph: ir.Graph) -> dict[int, _Kind]:
    """What is known of tensors by their offset: the width from their type, the background from who reads them."""
    kinds, offsets = {}, {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            offset = offsets[value] = tensor.offset or 0
            if tensor.dtype.bitwidth in PLANES:
                kinds[offset] = _Kind(tensor.dtype.bitwidth, 0 if tensor.dtype.is_floating_point() else None)
    for node in graph:
        codes = node.inputs[1] if node.op_type == "MatMulNBits" else None
        bits = node.attributes.get_int("bits", 4)
        if codes is None or codes not in offsets or bits not in (4, 8):
            continue
        zeros = node.inputs[3] if len(node.inputs) > 3 else None
        places = None
        if zeros is not None:
            if zeros not in offsets or zeros.dtype != ir.DataType.UINT8:
                continue
            block = node.attributes.get_int("block_size", 32)
            places = offsets[zeros], block, codes.const_value.shape[1] * block
        kinds[offsets[codes]] = _Kind(bits, 1 << (bits - 1), places)
    return kinds


def _pack(
    content: NDArray[np.uint8], offset: int, kind: _Kind, file: NDArray[np.uint8], numbers: dict[int, int]
) -> tuple[Segment, list[bytes]]:
    """A tensor's segment and its streams: the mask if there is one, then the planes."""
    elements = _elements(content, kind.width)
    places, background = None, kind.background
    if kind.zero_points is not None:
        zeros, block, row = kind.zero_points
        places = ZeroPoints(numbers[zeros], block, row)
        rows = len(elements) // row
        packed = file[zeros : zeros + rows * ((row // block * kind.width + 7) // 8)]
        points = _elements(packed, kind.width).reshape(rows, -1)[:, : row // block]
        differences = elements - np.repeat(points.ravel(), block)
    else:
        background = _most_frequent(elements) if background is None else background
        differences = elements - elements.dtype.type(background)
    if kind.width == 4:
        differences &= 15
    present = differences != 0
    if present.mean() <= 1 - WORTH_A_MASK:
        mask = deflate(np.packbits(present).tobytes())
        differences = differences[present]
    else:
        mask = b""
    planes = [deflate(plane.tobytes()) for plane in _planes(differences, kind.width)]
    segment = Segment(offset, len(content), kind.width, background or 0, len(mask), tuple(map(len, planes)), places)
    return segment, [mask, *planes]


def _elements(content: NDArray[np.uint8], width: int) -> Elements:
    if width == 4:
        return np.stack([content & 15, content >> 4], axis=-1).ravel()
    elements: Elements = content.view(f"<u{width // 8}")
    return elements


def _planes(values: Elements, width: int) -> list[NDArray[np.uint8]]:
    """The values' bytes, the lowest of each first; two values of 4 bits are a byte."""
    if width == 4:
        padded = np.pad(values, (0, len(values) % 2)).astype(np.uint8)
        return [padded[::2] | (padded[1::2] << np.uint8(4))]
    return list(np.ascontiguousarray(values).view(np.uint8).reshape(-1, width // 8).T)


def _most_frequent(elements: Elements) -> int:
    if elements.itemsize == 1:
        return int(np.bincount(elements, minlength=1).argmax())
    return 0
