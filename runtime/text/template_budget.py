"""What a rendering of a chat template may take: time, and the sizes of all values that it makes."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import Undefined

SECONDS = 2.0
"""Longest time that a rendering may take."""
VALUE = 1 << 20
"""Largest value that is made beside the messages, in characters and elements."""
TOTAL = 1 << 22
"""Characters and elements of all values that a rendering makes beside copies of the messages."""
_COPIES = 50
"""Number of times that the messages may be copied."""
BITS = 4096
"""Largest whole number, in bits."""
_FIXED = 16
"""What a value costs beside its characters and elements."""
_PLAIN = (int, float, complex, range, Undefined, type(None))
"""Types beside texts and collections that may be written."""


class TemplateLimitError(jinja2.TemplateError):
    """A template does more than a template may."""


class Budget:
    """What is left for a rendering.

    Args:
        variables: What the program gives, of plain types. It holds them anyway, and a template cannot change them.
        marks: What characters of the variables stand for where the template asks what they hold.
    """

    def __init__(self, variables: dict[str, Any], marks: Mapping[int, str]) -> None:
        self._deadline = time.monotonic() + SECONDS
        self._sizes: dict[int, int] = {}
        given = self._given(variables)
        self.marks = marks
        self.value = VALUE + 4 * given
        self._left = TOTAL + _COPIES * given

    def _given(self, value: Any) -> int:
        """Return the size of a given value, and keep those of its collections."""
        if isinstance(value, str):
            return len(value) + 1
        if isinstance(value, dict):
            size = 1 + sum(self._given(key) + self._given(item) for key, item in value.items())
        elif isinstance(value, list):
            size = 1 + sum(map(self._given, value))
        else:
            return 1
        self._sizes[id(value)] = size
        return size

    def tick(self, size: int = 0) -> None:
        """Count a step, and the characters that it writes."""
        self.look()
        self.take(size + _FIXED)

    def look(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds")

    def take(self, size: int) -> None:
        """Count a value that is made."""
        self.check(size)
        self._left -= size
        if self._left < 0:
            raise TemplateLimitError("it makes too many texts, lists or steps")

    def measure(self, value: Any, *, written: bool = False) -> int:
        """Return the size of a value, all that it holds included, each as often as it is held.

        Args:
            value: The value.
            written: Whether it becomes text. Then it must be of plain types: what others would write is not known.
        """
        self.look()
        total, pending = 0, [value]
        while pending:
            each = pending.pop()
            total += self._sizes.get(id(each), 1)
            if isinstance(each, str | bytes):
                total += len(each)
            elif id(each) in self._sizes:
                pass
            elif isinstance(each, list | tuple):
                pending += each
            elif isinstance(each, Mapping):
                pending += [*each.keys(), *each.values()]
            elif isinstance(each, _PLAIN):
                pass
            elif isinstance(each, Collection):  # views of mappings are written whole
                pending += each
            elif written:
                raise TemplateLimitError(f"it writes a {type(each).__name__}, which is no text, number or list")
            if total > self.value:
                raise TemplateLimitError("it makes texts or lists that are too large")
        return total

    def check(self, size: int) -> None:
        """Refuse a value of this size before it is made."""
        if size > self.value:
            raise TemplateLimitError("it makes texts or lists that are too large")

    def reached(self, value: Any) -> Any:
        """Return a value that stands in another one, and that is not too large to be compared and passed on."""
        self.look()
        if isinstance(value, str | Collection):
            self.measure(value)
        return value

    def made(self, value: Any) -> Any:
        """Count a value that was made, and return it."""
        if isinstance(value, str):
            self.take(len(value) + _FIXED)
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.take(self.measure(value) + _FIXED)
        else:
            if isinstance(value, int) and value.bit_length() > BITS:
                raise TemplateLimitError("it computes numbers that are too large")
            self.tick()
        return value


BUDGET: ContextVar[Budget] = ContextVar("budget")
