"""Tokens that decoding yields."""

from __future__ import annotations

from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


class Token(NamedTuple):
    """One new token of one sequence.

    Attributes:
        sequence: Index of the prompt.
        id: Token id.
        finish_reason: Why it is the last one; None if it is not.
    """

    sequence: int
    id: int
    finish_reason: FinishReason | None


def finish_reason(token: int, eos: frozenset[int], budget: int) -> FinishReason | None:
    """Return why a token is the last one, if it is: it ends texts, or no more tokens are left to generate."""
    return "stop" if token in eos else "length" if budget == 0 else None
