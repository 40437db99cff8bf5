"""The report's colors, each with a light and a dark value, and the assignment of colors to members.

Charts are drawn in the light values. The page's style sheet replaces each by its CSS variable, which has another value
in dark mode: a presentation attribute like fill="#0072b2" gives way to any CSS rule. The light values must therefore
all differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Color(NamedTuple):
    """One color: its value in light mode and in dark mode."""

    light: str
    dark: str


COLORS = {
    "background": Color("#fefefe", "#15171b"),
    "text": Color("#1b1f24", "#e9ebee"),
    "muted": Color("#5b6470", "#9ca5b1"),
    "border": Color("#e3e6ea", "#2c3138"),
    "surface": Color("#f5f6f8", "#1d2026"),
    # Members: Okabe and Ito's palette for color-blind readers (jfly.uni-koeln.de/color), then two of Tol's colors.
    "m0": Color("#0072b2", "#4fa8e0"),
    "m1": Color("#d55e00", "#f58a42"),
    "m2": Color("#009e73", "#35c79c"),
    "m3": Color("#cc79a7", "#e59cc5"),
    "m4": Color("#e69f00", "#f2bd4e"),
    "m5": Color("#56b4e9", "#9bd4f5"),
    "m6": Color("#882255", "#d16a9c"),
    "m7": Color("#999933", "#c6c665"),
    "student": Color("#8a6a3a", "#cfae78"),
    # Heat map, from good to bad.
    "h0": Color("#d9e8f3", "#173a52"),
    "h1": Color("#eaf1f6", "#1a2a36"),
    "h2": Color("#f7f4f0", "#24211e"),
    "h3": Color("#fae8d8", "#3d2a1b"),
    "h4": Color("#f5cfae", "#5c3717"),
    "h5": Color("#eeb17f", "#7d4511"),
}
MEMBER_COLORS = tuple(name for name in COLORS if name[0] == "m" and name[1:].isdigit())
HEAT_COLORS = tuple(name for name in COLORS if name[0] == "h")


def light(name: str) -> str:
    """Return a color's light value, which charts are drawn in."""
    return COLORS[name].light


def member_colors(members: Iterable[str]) -> dict[str, str]:
    """Map each member's name to a color's name; with more than eight members, colors repeat."""
    return {name: MEMBER_COLORS[index % len(MEMBER_COLORS)] for index, name in enumerate(members)}


def style_sheet() -> str:
    """Return CSS with the colors as variables, light and dark, and the rules that apply them to charts."""
    variables = {
        mode: "".join(f"--{name}:{getattr(color, mode)};" for name, color in COLORS.items()) for mode in Color._fields
    }
    attributes = "\n".join(
        f'svg [{attribute}="{color.light}"]{{{attribute}:var(--{name})}}'
        for name, color in COLORS.items()
        for attribute in ("fill", "stroke")
    )
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{variables['dark']}}}}}"
    return f":root{{{variables['light']}}}\n{dark}\n{attributes}\n"
