"""Estimate the size of a student's graph before the student exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.export.budget.costs import block_bytes
from edgemix.export.drafting.draft_head import draft_size
from edgemix.formats import FORMAT_SPECS

if TYPE_CHECKING:
    from edgemix.export.distillation.student import Shape
    from edgemix.formats import Format

_TABLE_BYTES = 1.0625
"""Bytes of a weight in a quantized embedding table or head."""
_ID = 6
"""Bytes of a token's id in a list."""
_LAYER = 9_500
"""Bytes of a layer's nodes."""


def student_bytes(
    student: Shape, weight_format: Format, member: Shape, size: int, stored: Format, *, group: int
) -> int:
    """Bytes of a student's graph, by those of a graph of the member that it is cut from.

    Args:
        student: Its shape.
        weight_format: The format of its graph.
        member: The member's shape.
        size: Bytes of the member's graph, of format `stored`.
        group: Inputs that share a scale in int4.
    """
    # Tables, norms and angles; in floating point, tables are most of it.
    rest = size - _weights(member) * _rate(stored, group)
    rest *= student.head / member.head * _table_rate(weight_format) / _table_rate(stored)
    return round(rest + _weights(student) * _rate(weight_format, group))


def draft_bytes(student: Shape, weight_format: Format, vocabulary: int) -> int:
    """Bytes of what it drafts with beside that: a head of some tokens, and their ids.

    Args:
        student: Its shape.
        weight_format: The format of its graph.
        vocabulary: Number of token ids.
    """
    size = draft_size(vocabulary)
    return (
        round(size * (student.head / vocabulary * _table_rate(weight_format) + _ID) + student.layers * _LAYER)
        if size
        else 0
    )


def _weights(shape: Shape) -> float:
    return shape.layers * (shape.attention + shape.ffn)


def _rate(weight_format: Format, group: int) -> float:
    """Bytes of a layer's weight."""
    row = FORMAT_SPECS[weight_format]
    if row.stored_bytes is not None:
        return row.stored_bytes
    block = group if row.mixed_bits else 32
    return block_bytes(16, 4096, bits=row.bits, block=block, zero_points=row.mixed_bits) / (16 * 4096)


def _table_rate(weight_format: Format) -> float:
    """Bytes of a weight in a table."""
    row = FORMAT_SPECS[weight_format]
    return row.bits / 8 if row.floating_point else _TABLE_BYTES
