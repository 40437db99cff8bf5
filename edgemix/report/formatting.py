"""Numbers and names as text for people."""

from __future__ import annotations

import re

MAX_NAME_LENGTH = 64
"""Characters of a name that are shown at most."""

# Control characters except tabs and line ends, characters that change the direction of the text around them, lone
# surrogates, and the code points that XML forbids.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Replace every unprintable character, so that a name cannot hide or reorder text in a report."""
    return _UNPRINTABLE.sub("\ufffd", text)


def name(text: str) -> str:
    """Put a name on one line, and shorten it if it is very long."""
    line = " ".join(clean(text).split())
    return line if len(line) <= MAX_NAME_LENGTH else f"{line[: MAX_NAME_LENGTH - 1]}…"


def size(count: float) -> str:
    """Format a number of bytes, in decimal megabytes or gigabytes if it is large."""
    if count >= 1e10:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,.0f} B"


def count(number: float) -> str:
    """Format a large count, like 134.5 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:,.1f} {unit}"
    return f"{number:,.0f}"


def seconds(value: float) -> str:
    """Format a duration in seconds, milliseconds or microseconds."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= limit:
            return f"{digits(value / limit)} {unit}"
    return f"{digits(value * 1e6)} µs"


def digits(value: float) -> str:
    """Format a number with three significant digits; digits before the decimal point are never dropped."""
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{places}f}"


def share(value: float, places: int = 0) -> str:
    """Format a fraction of one as a percentage."""
    return f"{100 * value:.{places}f}%"


def join(names: list[str]) -> str:
    """Join names with commas and "and"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
