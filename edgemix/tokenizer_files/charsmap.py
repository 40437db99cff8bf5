"""Check of a precompiled character map, SentencePiece's normalization rules in binary form."""

from __future__ import annotations

import base64
import binascii
import struct


def longest_replacement(encoded: object) -> int:
    """Return the bytes of the longest replacement of a character map: what one byte of text may become.

    The map is a length, a double-array trie of that many bytes, and replacements that end in NUL each. The tokenizers
    library reserves memory by the length as it is written, and aborts the process where there is less.

    Raises:
        ValueError: It is not Base64, or its length is not that of a trie within it.
    """
    try:
        data = base64.b64decode(str(encoded), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not Base64") from None
    if len(data) < 4:
        raise ValueError("it has no trie")
    (size,) = struct.unpack_from("<I", data)
    if not 4 <= size <= len(data) - 4 or size % 4:
        raise ValueError(f"its trie should have {size:,} bytes, and {len(data) - 4:,} follow")
    try:
        data[4 + size :].decode()
    except UnicodeDecodeError:
        raise ValueError("its replacements are not UTF-8") from None
    return max(map(len, data[4 + size :].split(b"\0")))
