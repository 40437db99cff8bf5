"""A trie over words: finds entries of one or more words in a text, the longest at each place, in linear time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_WORDS = 32
"""Most words and signs of an entry: how far the search looks ahead."""
_PIECE = re.compile(r"(\s*)(\w+(?:['\u2019]\w+)*|[^\w\s])")


class Piece(NamedTuple):
    """A word or a sign of a text, its key, whether it is a word, and its place in characters."""

    key: str
    is_word: bool
    start: int
    end: int


class Entry(NamedTuple):
    """What some words mean: what they speak for, or how they change what follows them.

    Attributes:
        exact: The words as they must be written; None where letter case does not matter.
        label: Index of the label, None for a modifier.
        strength: Strength, or what a booster adds.
        negates: Whether the words negate what follows.
    """

    exact: str | None
    label: int | None
    strength: float
    negates: bool = False


class _Node:
    __slots__ = ("entries", "next")

    def __init__(self) -> None:
        self.next: dict[str, _Node] = {}
        self.entries: list[Entry] = []


class Match(NamedTuple):
    """Entries found at pieces `first` to `last` of a text."""

    first: int
    last: int
    entries: list[Entry]


def pieces_of(text: str) -> list[Piece]:
    """Return the words and signs of a text; the key of one after white space begins with a blank."""
    found: list[Piece] = []
    for match in _PIECE.finditer(text):
        word = match[2]
        key = word.lower().replace("\u2019", "'")
        space = " " if match[1] and found else ""
        found.append(Piece(space + key, word[0].isalnum() or word[0] == "_", match.start(2), match.end(2)))
    return found


class PhraseTrie:
    """Entries by their words."""

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, text: str, entry: Entry) -> bool:
        """Add an entry; False if it has no words or signs, or more than MAX_WORDS."""
        pieces = pieces_of(text)
        if not 1 <= len(pieces) <= MAX_WORDS:
            return False
        node = self._root
        for piece in pieces:
            node = node.next.setdefault(piece.key, _Node())
        node.entries.append(entry)
        return True

    def find(self, text: str, pieces: list[Piece]) -> Iterator[Match]:
        """Yield what is found from left to right, none overlapping another."""
        at = 0
        while at < len(pieces):
            found = self._longest(text, pieces, at)
            if found is not None:
                yield found
            at = at + 1 if found is None else found.last + 1

    def _longest(self, text: str, pieces: list[Piece], at: int) -> Match | None:
        node = self._root.next.get(pieces[at].key.lstrip(" "))
        best, end = None, at
        while node is not None:
            if node.entries:
                written = text[pieces[at].start : pieces[end].end]
                entries = [entry for entry in node.entries if entry.exact is None or entry.exact == written]
                best = Match(at, end, entries) if entries else best
            end += 1
            node = node.next.get(pieces[end].key) if end < len(pieces) else None
        return best
