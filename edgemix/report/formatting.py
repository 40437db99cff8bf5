"""Figures and names as a reader sees them."""

from __future__ import annotations

import re

NAME = 64
"""Most characters of a name that are shown."""

# Control characters but for tabs and line ends, what changes the direction of the text around it, halves of characters,
# and what XML forbids.
_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text with what is no text replaced: nothing in a report comes unseen from a name."""
    return _UNSHOWN.sub("\ufffd", text)


def name(text: str) -> str:
    """A name on one line, shortened if it is very long."""
    line = " ".join(clean(text).split())
    return line if len(line) <= NAME else f"{line[: NAME - 1]}…"


def size(count: float) -> str:
    """Bytes, in MB of a million."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,.0f} B"


def count(number: float) -> str:
    """A large number of things, like 134.5 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:,.1f} {unit}"
    return f"{number:,.0f}"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= limit:
            return f"{digits(value / limit)} {unit}"
    return f"{digits(value * 1e6)} µs"


def digits(value: float) -> str:
    """Three significant digits, as far as they stand behind the point."""
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{places}f}"


def share(value: float, places: int = 0) -> str:
    """A part of one, in percent."""
    return f"{100 * value:.{places}f}%"


def listed(names: list[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
