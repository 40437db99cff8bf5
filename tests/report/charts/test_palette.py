"""The report's colors."""

from __future__ import annotations

import pytest

from edgemix.report.charts.palette import COLORS, MEMBER_COLORS, member_colors


def test_light_colors_are_distinct():
    """The style sheet finds a color by its light value; two equal values would get the same dark one."""
    light = [color.light for color in COLORS.values()]
    assert len(set(light)) == len(light)
    names = [f"m{at}" for at in range(10)]
    assert list(member_colors(names).values())[:8] == list(MEMBER_COLORS)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_has_enough_contrast(mode):
    """Contrast by WCAG 2.2; members' colors may have less, as labels stand beside them."""

    def contrast(one: str, other: str) -> float:
        brighter, darker = sorted(map(luminance, (one, other)), reverse=True)
        return (brighter + 0.05) / (darker + 0.05)

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    color = {name: getattr(each, mode) for name, each in COLORS.items()}
    for background in ("background", "surface", *(name for name in color if name[0] == "h")):
        assert contrast(color["text"], color[background]) > 4.5
    assert contrast(color["muted"], color["background"]) > 4.5
    assert contrast(color["student"], color["background"]) > 3
    assert all(contrast(color[name], color["background"]) > 2 for name in MEMBER_COLORS)
