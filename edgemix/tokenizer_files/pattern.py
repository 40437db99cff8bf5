"""Check of regular expressions, so that matching does not take time beyond measure.

The tokenizers library matches by backtracking (Oniguruma). Time is exponential where a repeated group can match a text
in several ways and something after it fails, and a polynomial where repetitions come in a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PATTERN = 8_192
"""Most characters of an expression."""
MAX_DEPTH = 16
"""Most groups inside one another."""
MAX_REPEAT = 1_000
"""Most repetitions that a count may ask for, those of the groups around it included."""
MAX_ATOMS = 20_000
"""Most characters, classes and groups, each as often as it is repeated at most."""
MAX_VARIABLE = 8
"""Most repetitions of variable length in one alternative."""
MAX_UNBOUNDED = 1
"""Most long repetitions in one alternative that something must follow: where it fails, all their lengths are tried."""
_LONG = 16
"""Most repetitions that are not long."""

_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_OPENING = re.compile(r"\(\?(?:[:=!>]|<[=!]|[im]*(?:-[im]*)?[:)])")
_CLASS = re.compile(r"\[\^?\]?")
_ENDLESS = 1 << 30


@dataclass
class _Found:
    """What an expression, or a part of it, has.

    Attributes:
        variable: Repetitions of variable length in an alternative.
        unbounded: Those of them that are long.
        followed: Those of the long ones that something must follow.
        alternatives: Whether there is more than one.
        ambiguous: Whether there is a repeated part that may match in several ways, with nothing after it so far.
        repeats: Greatest product of counts.
    """

    variable: int = 0
    unbounded: int = 0
    followed: int = 0
    alternatives: bool = False
    ambiguous: bool = False
    repeats: int = 1


def check_pattern(pattern: str) -> None:
    """Check a regular expression.

    Raises:
        ValueError: It is long, deeply nested, calls itself or refers to a group, or may take exponential time.
    """
    if not 0 < len(pattern) <= MAX_PATTERN:
        raise ValueError(f"an expression may have 1 to {MAX_PATTERN:,} characters")
    scanner = _Scanner(pattern)
    scanner.alternatives(0)
    if scanner.at < len(pattern):
        raise ValueError("a parenthesis closes no group")


class _Scanner:
    """Reads an expression from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.at = self._atoms = 0

    def alternatives(self, depth: int) -> _Found:
        """Read up to the end of a group."""
        if depth > MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {MAX_DEPTH} deep")
        found, one = _Found(), _Found()
        while self.at < len(self._pattern) and self._pattern[self.at] != ")":
            if self._pattern[self.at] == "|":
                self.at += 1
                found, one = self._either(found, one), _Found()
                found.alternatives = True
            else:
                self._item(one, depth)
        return self._either(found, one)

    @staticmethod
    def _either(found: _Found, one: _Found) -> _Found:
        return _Found(
            max(found.variable, one.variable),
            max(found.unbounded, one.unbounded),
            max(found.followed, one.followed),
            found.alternatives or one.alternatives,
            found.ambiguous or one.ambiguous,
            max(found.repeats, one.repeats),
        )

    def _item(self, one: _Found, depth: int) -> None:
        """Read an atom and its repetition, and add them to an alternative."""
        if one.ambiguous:
            raise ValueError("a group is repeated that may match in several ways, and something follows it")
        inner = self._atom(depth) or _Found()
        several = inner.variable > 0 or inner.alternatives
        least, most = self._repetition()
        if self._repetition() != (1, 1):
            raise ValueError("a repetition is repeated")
        inner.repeats *= max(1, least if most == _ENDLESS else most)
        if inner.repeats > MAX_REPEAT:
            raise ValueError(f"it repeats a part more than {MAX_REPEAT:,} times")
        self._atoms += inner.repeats
        if self._atoms > MAX_ATOMS:
            raise ValueError(f"it repeats more than {MAX_ATOMS:,} parts")
        one.repeats = max(one.repeats, inner.repeats)
        one.followed = max(one.followed, one.unbounded * (least > 0) + inner.followed)
        one.variable += inner.variable + (least != most)
        one.unbounded += inner.unbounded + (least != most > _LONG)
        one.ambiguous = inner.ambiguous or (several and most > 1)
        if one.variable > MAX_VARIABLE or one.followed > MAX_UNBOUNDED:
            raise ValueError("it has too many repetitions in a row")

    def _atom(self, depth: int) -> _Found | None:
        """Read one atom; return what a group holds, None for others."""
        character = self._pattern[self.at]
        if character == "(":
            return self._group(depth)
        if character == "[":
            self._class()
        elif character == "\\":
            self._escape()
        else:
            self.at += 1
        return None

    def _group(self, depth: int) -> _Found:
        opening = _OPENING.match(self._pattern, self.at)
        if opening is None and self._pattern.startswith("(?", self.at):
            raise ValueError("it has a group of a kind that edgemix does not know")
        self.at = opening.end() if opening else self.at + 1
        if opening and opening.group().endswith(")"):  # options for what follows
            return _Found()
        found = self.alternatives(depth + 1)
        if self.at >= len(self._pattern):
            raise ValueError("a group is not closed")
        self.at += 1
        if opening and opening.group()[2:] in ("=", "!", "<=", "<!") and found.ambiguous:
            raise ValueError("a group is repeated that may match in several ways, inside a condition")
        return found

    def _class(self) -> None:
        """Read a character class; Oniguruma's may be nested."""
        depth = 0
        while self.at < len(self._pattern):
            character = self._pattern[self.at]
            opening = _CLASS.match(self._pattern, self.at)
            if opening is not None:
                self.at = opening.end()
                depth += 1
            elif character == "\\":
                self._escape()
            else:
                self.at += 1
                depth -= character == "]"
            if depth == 0:
                return
        raise ValueError("a class of characters is not closed")

    def _escape(self) -> None:
        following = self._pattern[self.at + 1 : self.at + 2]
        if following in ("", "k", "g", "K", "X", "R", "y", "Y") or following in "123456789":
            raise ValueError(f"it has \\{following}, which edgemix does not allow")
        self.at += 2
        if following in "pPxou" and self._pattern.startswith("{", self.at):
            end = self._pattern.find("}", self.at)
            if end < 0:
                raise ValueError(f"\\{following}{{ is not closed")
            self.at = end + 1

    def _repetition(self) -> tuple[int, int]:
        """Read how often the atom before is repeated: least and most."""
        rest = self._pattern[self.at : self.at + 1]
        bounds = {"*": (0, _ENDLESS), "+": (1, _ENDLESS), "?": (0, 1)}.get(rest)
        if bounds is not None:
            self.at += 1
            if self._pattern[self.at : self.at + 1] in ("?", "+"):  # lazy, possessive
                self.at += 1
            return bounds
        count = _COUNT.match(self._pattern, self.at)
        if count is None or not (count[1] or count[3]):
            return 1, 1
        self.at = count.end()
        if self._pattern[self.at : self.at + 1] == "?":  # lazy; a "+" here would repeat the repetition
            self.at += 1
        if max(len(count[1]), len(count[3])) > 6:
            raise ValueError(f"it repeats a part more than {MAX_REPEAT:,} times")
        least = int(count[1] or 0)
        return least, int(count[3]) if count[3] else _ENDLESS if count[2] else least
