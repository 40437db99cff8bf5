"""From token ids to text as they are generated: whole characters, and no part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.runtime.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
_CONTEXT = 6
"""Tokens before the first new one that are decoded with it: decoders treat a text's first token differently."""


class IncrementalDecoder:
    """Decodes a text as its tokens are generated, whole characters only.

    A character whose bytes are spread over several tokens is returned with the last of them; one that is incomplete
    when the tokens end is left out. The result is exactly what decoding prompt and new tokens at once would add.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        start = max(0, len(prompt) - _CONTEXT)
        while start > 0 and tokenizer.decode(prompt[start:]).startswith(_INCOMPLETE):
            start -= 1  # it would begin inside a character
        self._ids = list(prompt[start:])
        self._shown = tokenizer.decode(self._ids)
        self._new = 0

    def add(self, token: int) -> str:
        """Return the text that `token` completes; often empty."""
        self._ids.append(token)
        self._new += 1
        text = self._tokenizer.decode(self._ids)
        added = text[len(self._shown) :]
        if not added or text.endswith(_INCOMPLETE):
            return ""
        # The added text begins and ends with whole characters, which is context enough for what follows.
        self._ids = self._ids[-self._new :]
        self._shown = self._tokenizer.decode(self._ids)
        self._new = 0
        return added


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Return the text that can be shown now, and whether a stop string was found right after it."""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def rest(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
