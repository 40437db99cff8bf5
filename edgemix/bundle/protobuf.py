"""Protobuf's wire format, as far as ONNX files need it (https://protobuf.dev/programming-guides/encoding).

The `onnx` package is too heavy for the runtime. Nothing is allocated by a number from the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    Data = bytes | mmap.mmap

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class MalformedError(ValueError):
    """The bytes are no such message; the text says why."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: Which one.
        value: Of a number; None where the field is bytes, or a number of fixed width.
        start: Where its bytes begin; None where it is a number.
        end: Where it ends.
    """

    number: int
    value: int | None
    start: int | None
    end: int


def fields(data: Data, position: int, end: int) -> Iterator[Field]:
    """The fields of a message that lies between two places.

    Raises:
        MalformedError: It is none.
    """
    while position < end:
        found = field(data, position, end)
        yield found
        position = found.end


def field(data: Data, position: int, end: int) -> Field:
    """The field at `position` of a message that ends at `end`.

    Raises:
        MalformedError: There is none.
    """
    tag, position = varint(data, position, end)
    if not 8 <= tag < 1 << 32:  # other parsers would cut a wider tag off, and see another field than this one
        raise MalformedError(f"it has a field tag of {tag} before byte {position:,}")
    number, wire = tag >> 3, tag & 7
    value = start = None
    if wire == _VARINT:
        value, position = varint(data, position, end)
    elif wire == _FIXED64:
        position += 8
    elif wire == _FIXED32:
        position += 4
    elif wire == _BYTES:
        length, start = varint(data, position, end)
        position = start + length
    else:
        raise MalformedError(f"it has a field of the wire type {wire} before byte {position:,}")
    if position > end:
        raise MalformedError(f"a field ends at byte {position:,}, beyond its message's end at {end:,}")
    return Field(number, value, start, position)


def varint(data: Data, position: int, end: int) -> tuple[int, int]:
    """A base-128 number of at most ten bytes, and where it ends.

    Raises:
        MalformedError: There is none.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise MalformedError(f"it is cut off at byte {position:,}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise MalformedError(f"it has a number of more than ten bytes at byte {position:,}")


def encode(*parts: tuple[int, int | str | bytes]) -> bytes:
    """A message from its fields, number and value: numbers are varints (not negative), the rest is bytes."""
    message = bytearray()
    for number, value in parts:
        if isinstance(value, int):
            message += _encode_varint(number << 3 | _VARINT) + _encode_varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            message += _encode_varint(number << 3 | _BYTES) + _encode_varint(len(content)) + content
    return bytes(message)


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
