"""Numbers that anybody may have given: whole numbers in Python have no largest one."""

from __future__ import annotations

import math
import sys

_LONGEST = 10**30
"""From here on, a whole number is not written with all its digits."""


def is_finite(number: float) -> bool:
    """Whether a number is finite as a float, too: `math.isfinite` raises an OverflowError for large whole numbers."""
    return -sys.float_info.max <= number <= sys.float_info.max


def shown(number: object) -> str:
    """Return a number as text for a message; a whole number of many digits by its size."""
    if isinstance(number, int) and abs(number) >= _LONGEST:
        return f"about {'-' if number < 0 else ''}10^{round((number.bit_length() - 0.5) * math.log10(2))}"
    return str(number)
