"""Hostile values, and mutations of bytes, texts and JSON documents."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

_RAW = "@raw:"
"""Begins a string in the place of JSON that `json.dumps` does not write."""
RAW_VALUES = {
    "overflow": "1e999",
    "deep-list": "[" * 5_000 + "]" * 5_000,
    "deep-object": '{"a":' * 2_000 + "1" + "}" * 2_000,
    "long-number": "9" * 5_000,
    "nan": "NaN",
    "unclosed": "[[{",
}
INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    257,
    258,
    1 << 15,
    1 << 16,
    1 << 24,
    (1 << 28),
    (1 << 31) - 1,
    1 << 31,
    -(1 << 31),
    (1 << 32) - 1,
    1 << 40,
    (1 << 62),
    (1 << 63) - 1,
    -(1 << 63),
    1 << 63,
    (1 << 64) - 1,
    10**30,
)
TEXTS = (
    "",
    " ",
    "\0",
    "a",
    "\ud800",
    "\udfff\ud800",
    "é",
    "𝄞",
    "\x1b[2J",
    "../../etc/passwd",
    "/dev/zero",
    "a" * 70_000,
    "(a+)+$",
    "(?=a)",
    "[",
    "\\",
    "%s%n",
    "{{7*7}}",
    "\u202e",
    "Ġ",
    "▁",
    "<s>",
    "</s>",
    "<unk>",
    "NaN",
    "null",
    "x" * 300,
)


_LARGEST = 24 << 20


def integer(rng: Random) -> int:
    """Return a number near a boundary."""
    return rng.choice(INTEGERS) + rng.choice((0, 0, 0, 1, -1))


def value(rng: Random) -> Any:
    """Return any value of JSON, most often one that nobody expects."""
    kind = rng.randrange(8)
    if kind < 2:
        return integer(rng)
    if kind < 4:
        return rng.choice(TEXTS)
    return (
        rng.choice((None, True, False, 0.5, -0.0, 1e308, 5e-324)),
        rng.choice(([], {}, [[]], {"": None}, [None], ["a"] * 1_000, [integer(rng)])),
        _RAW + rng.choice(sorted(RAW_VALUES)),
        {"type": rng.choice(TEXTS)},
    )[kind - 4]


def mutated_bytes(rng: Random, data: bytes) -> bytes:
    """Return bytes with a few flips, cuts, insertions and repetitions."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        action = rng.randrange(6)
        if action < 2 and place < len(content):
            content[place] = rng.choice(
                (0, 0x7F, 0x80, 0xFF, rng.randrange(256), content[place] ^ 1 << rng.randrange(8))
            )
        elif action == 2:
            del content[place : place + length]
        elif action == 3:
            content[place:place] = rng.choice((b"\0", b"\xff", b"\x80", b"\xed\xa0\x80", b"A")) * length
        elif action == 4:
            content[place:place] = content[place : place + length] * rng.choice((1, 2, 50))
        elif rng.randrange(8) == 0:
            del content[place:]
    return bytes(content)


def mutated_json(rng: Random, data: bytes) -> bytes:
    """Return a JSON document with a few values replaced, removed, repeated, wrapped or moved."""
    try:
        document = [json.loads(data)]  # in a list, so that the document itself can be replaced
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            _mutate_one(rng, document)
        return dumps(document[0])
    except (ValueError, RecursionError):  # it was mutated before
        return mutated_bytes(rng, data)


def dumps(document: Any) -> bytes:
    """Encode JSON, with what `json` does not write in the places that stand for it.

    Raises:
        ValueError: It is larger than any file that a case needs.
    """
    parts, size = [], 0
    for part in json.JSONEncoder().iterencode(document):
        parts.append(part)
        size += len(part)
        if size > _LARGEST:  # lists that were repeated in lists that were repeated
            raise ValueError("the document is too large")
    text = "".join(parts)
    for name, raw in RAW_VALUES.items():
        text = text.replace(json.dumps(_RAW + name), raw)
    return text.encode()


def _mutate_one(rng: Random, document: list[Any]) -> None:
    holder, key = _place(rng, document)
    action = rng.randrange(8)
    if action < 4:
        holder[key] = value(rng)
    elif action == 4 and holder is not document:
        del holder[key]
    elif action == 5:
        holder[key] = [holder[key]] * rng.choice((1, 2, 1_000))
    elif action == 6:
        other, place = _place(rng, document)
        holder[key], other[place] = json.loads(json.dumps(other[place])), json.loads(json.dumps(holder[key]))
    elif isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = value(rng)
    elif isinstance(holder[key], str):
        text = holder[key]
        cut = rng.randrange(len(text) + 1)
        holder[key] = text[:cut] + rng.choice(TEXTS) + text[cut:]


def _place(rng: Random, document: list[Any]) -> tuple[Any, Any]:
    """Return a container and a key in it, at a depth that is as probable as any other."""
    holder, key = document, 0
    while isinstance(inner := holder[key], dict | list) and inner and rng.random() < 0.8:
        holder, key = inner, rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
    return holder, key
