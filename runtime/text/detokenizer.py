"""From token ids to text as they are generated: whole characters, and no part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.runtime.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
_CONTEXT = 6
"""Tokens before the first new one that are decoded with it: decoders treat a text's first token differently."""
_MOST_HELD = 64
"""Tokens after which held text is shown but for its last characters: it may end in U+FFFD for good."""
_LONGEST = 4
"""Most bytes of a character, and so most replacement characters that later bytes can still change."""


class IncrementalDecoder:
    """Decodes a text as its tokens are generated, whole characters only.

    A character whose bytes are spread over several tokens is returned with the last of them; one that is incomplete
    when the tokens end is returned by `rest`, as U+FFFD. The result is exactly what decoding prompt and new tokens at
    once would add.
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
        added = self._added(text)
        if not added:
            return ""
        if not text.endswith(_INCOMPLETE):
            # The added text begins and ends with whole characters, which is context enough for what follows.
            self._ids = self._ids[-self._new :]
            self._shown, self._new = self._tokenizer.decode(self._ids), 0
            return added
        return self._show_settled(added) if self._new >= _MOST_HELD else ""

    def rest(self) -> str:
        """Return the text that was held back, at the end of the tokens."""
        return self._added(self._tokenizer.decode(self._ids)) if self._new else ""

    def _show_settled(self, added: str) -> str:
        """Return held text without its end, which later bytes may change."""
        ids = self._ids[-_MOST_HELD // 2 :]
        text = self._tokenizer.decode(ids)
        if not 2 * _LONGEST <= len(text) <= len(added) or not added.endswith(text[-_LONGEST:]):
            return ""
        self._ids, self._shown, self._new = ids, text[:-_LONGEST], len(ids)
        return added[:-_LONGEST]

    def _added(self, text: str) -> str:
        """Return what follows the shown text in `text`, the one of all ids."""
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # An invalid byte makes some decoders replace the bytes before it, which have been shown as characters.
        return self._tokenizer.decode(self._ids[-self._new :])


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may become one.

    Special tokens are pieces that stop strings match and that are never shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._hidden: list[bool] = []

    def add(self, piece: str, *, hidden: bool = False) -> tuple[str, bool]:
        """Return the text that can be shown now, and whether a stop string was found right after it.

        Args:
            piece: The text's next characters.
            hidden: Whether they are matched only, not shown.
        """
        self._held += piece
        self._hidden += [hidden] * len(piece)
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            text = self._take(min(found))
            self._held, self._hidden = "", []
            return text, True
        hold = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - hold), False

    def rest(self) -> str:
        """Return what was held back, at the end of the text."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        """Remove the first `count` held characters, and return those to show."""
        text = "".join(c for c, hidden in zip(self._held[:count], self._hidden, strict=False) if not hidden)
        self._held, self._hidden = self._held[count:], self._hidden[count:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
