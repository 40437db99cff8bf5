"""The colours of a report: one table with a light and a dark tone each, and who has which.

Charts are drawn in the light tones. In a page, CSS puts a dark one in each one's place where the reader wants that: a
presentation attribute like fill="#0072b2" gives way to any rule of a style sheet. So the tones must all be different.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Tone(NamedTuple):
    """One colour, on light paper and on dark."""

    light: str
    dark: str


TONES = {
    "paper": Tone("#fefefe", "#15171b"),
    "ink": Tone("#1b1f24", "#e9ebee"),
    "soft": Tone("#5b6470", "#9ca5b1"),
    "rule": Tone("#e3e6ea", "#2c3138"),
    "wash": Tone("#f5f6f8", "#1d2026"),
    "warn": Tone("#9a5b00", "#f0b658"),
    # Members: Okabe and Ito's, which colour-blind readers tell apart (jfly.uni-koeln.de/color), then two of Tol's.
    "m0": Tone("#0072b2", "#4fa8e0"),
    "m1": Tone("#d55e00", "#f58a42"),
    "m2": Tone("#009e73", "#35c79c"),
    "m3": Tone("#cc79a7", "#e59cc5"),
    "m4": Tone("#e69f00", "#f2bd4e"),
    "m5": Tone("#56b4e9", "#9bd4f5"),
    "m6": Tone("#882255", "#d16a9c"),
    "m7": Tone("#999933", "#c6c665"),
    "student": Tone("#8a6a3a", "#cfae78"),
    # Of a heat map, from good to bad.
    "h0": Tone("#d9e8f3", "#173a52"),
    "h1": Tone("#eaf1f6", "#1a2a36"),
    "h2": Tone("#f7f4f0", "#24211e"),
    "h3": Tone("#fae8d8", "#3d2a1b"),
    "h4": Tone("#f5cfae", "#5c3717"),
    "h5": Tone("#eeb17f", "#7d4511"),
}
MEMBER_TONES = tuple(name for name in TONES if name[0] == "m" and name[1:].isdigit())
HEAT_TONES = tuple(name for name in TONES if name[0] == "h")


def light(name: str) -> str:
    """The tone that charts are drawn in."""
    return TONES[name].light


def member_tones(members: Iterable[str]) -> dict[str, str]:
    """Member name -> name of its tone, the same in all of a report; more members than tones share them."""
    return {name: MEMBER_TONES[index % len(MEMBER_TONES)] for index, name in enumerate(members)}


def style_sheet() -> str:
    """The tones as CSS variables, light and dark, and the rules by which charts take them."""
    variables = {
        mode: "".join(f"--{name}:{getattr(tone, mode)};" for name, tone in TONES.items()) for mode in Tone._fields
    }
    attributes = "\n".join(
        f'svg [{attribute}="{tone.light}"]{{{attribute}:var(--{name})}}'
        for name, tone in TONES.items()
        for attribute in ("fill", "stroke")
    )
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{variables['dark']}}}}}"
    return f":root{{{variables['light']}}}\n{dark}\n{attributes}\n"
