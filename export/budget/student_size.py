"""How large a student's graph will be, before there is a student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.export.budget.costs import block_bytes
from edgemix.export.drafting.draft_head import draft_size

if TYPE_CHECKING:
    from edgemix.export.distillation.student import Shape
    from edgemix.formats import Format

_FLOAT: dict[Format, float] = {"fp32": 4.0, "fp16": 2.0}
_OTHER: dict[Format, float] = {"int8-dynamic": 1.02, "nf4": 0.5625}
"""Bytes a weight: a scale a row, and four bytes for 64 codes."""
_ID = 6
"""Bytes of a token's id in a list."""
_LAYER = 9_500
"""Bytes of a layer's nodes."""


def student_bytes(student: Shape, form: Format, member: Shape, size: int, stored: Format, *, group: int) -> int:
    """Bytes of a student's graph, by those of a graph of the member that it is cut from.

    Args:
        student: Its shape.
        form: The format of its graph.
        member: The member's shape.
        size: Bytes of the member's graph, of format `stored`.
        group: Inputs that share a scale in int4.
    """
    # Tables, norms and angles; in floating point, tables are most of it.
    rest = size - _weights(member) * _rate(stored, group)
    rest *= student.head / member.head * _table_rate(form) / _table_rate(stored)
    return round(rest + _weights(student) * _rate(form, group))


def draft_bytes(student: Shape, form: Format, vocabulary: int) -> int:
    """Bytes of what it drafts with beside that: a head of some tokens, and their ids.

    Args:
        student: Its shape.
        form: The format of its graph.
        vocabulary: Number of token ids.
    """
    size = draft_size(vocabulary)
    return round(size * (student.head / vocabulary * _table_rate(form) + _ID) + student.layers * _LAYER) if size else 0


def _weights(shape: Shape) -> float:
    return shape.layers * (shape.attention + shape.ffn)


def _rate(form: Format, group: int) -> float:
    """Bytes of a layer's weight."""
    if form in ("int4", "int8"):
        bits, block = (4, group) if form == "int4" else (8, 32)
        return block_bytes(16, 4096, bits=bits, block=block, zero_points=form == "int4") / (16 * 4096)
    return _FLOAT[form] if form in _FLOAT else _OTHER[form]


def _table_rate(form: Format) -> float:
    """Bytes of a weight in a table."""
    return _FLOAT.get(form, 1.0625)
