"""Mistakes in a recipe: where they are, and what is wrong."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

Where = tuple[str | int, ...]
"""A place in the data: keys, and indices of lists."""


class Problem(NamedTuple):
    """One mistake: where it is, and what is wrong with the remedy."""

    where: Where
    message: str

    def __str__(self) -> str:
        return f"{path_text(self.where)}: {self.message}" if self.where else self.message


def path_text(where: Where) -> str:
    """`("members", 1, "format")` as `members[1].format`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The remedy for an unknown word."""
    known = list(known)
    close = get_close_matches(word.casefold(), known, n=1)
    listed = f"one of {', '.join(known)}" if known else "there are none"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed
