"""Draw the README's figure from the tables of the guide's measurements.

    python tools/mixture_figure.py [-o edgemix/guide/mixture.svg]

Left: tokens per second of three experts mixed by the naive loop, of the exact mixture in fewer calls, and of one
member. Right: bits per byte on text that changes its domain, of the best expert, of fitted and of adaptive weights.
"""

from __future__ import annotations

import argparse
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

GUIDE = Path(__file__).parents[1] / "edgemix" / "guide"
WIDTH, HEIGHT, BAR, LABEL, VALUE = 920, 190, 30, 172, 48
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.other { fill: #8c959f }
.ours { fill: #1f6feb }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .other { fill: #6e7681 } .ours { fill: #58a6ff } }
"""


class Bar(NamedTuple):
    """One bar of a panel; `row` and `column` name a cell of a table."""

    label: str
    row: str
    ours: bool = False


SPEED = (
    "tokens/s",
    [
        Bar("naive loop of three", "naive loop"),
        Bar("exact mixture of three", "all together", ours=True),
        Bar("one member", "one member"),
    ],
)
QUALITY = (
    "stream",
    [
        Bar("best expert", "best expert"),
        Bar("mixture, fitted weights", "fitted mixture"),
        Bar("mixture, adaptive", "adaptive", ours=True),
    ],
)


def cell(text: str, row: str, column: str) -> float:
    """Return the first number of a cell, from the first table that has a row and a column of these names."""
    header: list[str] = []
    for line in text.splitlines():
        cells = [each.strip() for each in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif (
            column in header
            and cells[0].startswith(row)
            and (found := re.search(r"[\d.]+", cells[header.index(column)]))
        ):
            return float(found.group())
    raise SystemExit(f"measurements.md has no row {row!r} with a column {column!r}")


def panel(title: str, bars: list[Bar], values: list[float], left: int) -> list[str]:
    """Return a panel's SVG elements; bars begin at zero."""
    room = WIDTH // 2 - LABEL - VALUE - 30
    found = [f'<text class="title" x="{left}" y="24">{escape(title)}</text>']
    for number, (bar, value) in enumerate(zip(bars, values, strict=True)):
        top, length = 44 + number * (BAR + 16), room * value / max(values)
        kind = "ours" if bar.ours else "other"
        found += [
            f'<text x="{left}" y="{top + 20}">{escape(bar.label)}</text>',
            f'<rect class="{kind}" x="{left + LABEL}" y="{top}" width="{length:.1f}" height="{BAR}" rx="3"/>',
            f'<text x="{left + LABEL + length + 8:.1f}" y="{top + 20}">{value:g}</text>',
        ]
    return found


def draw(measurements: str) -> str:
    """Return the figure as SVG."""
    elements = []
    titles = ("Decoding, tokens per second", "Bits per byte on changing text (lower is better)")
    for (column, bars), title, left in zip((SPEED, QUALITY), titles, (10, WIDTH // 2 + 10), strict=True):
        elements += panel(title, bars, [cell(measurements, bar.row, column) for bar in bars], left)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    return "\n".join([head, f"<style>{STYLE}</style>", *elements, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the README's figure from the guide's measurements.")
    parser.add_argument("-o", "--output", type=Path, default=GUIDE / "mixture.svg")
    output: Path = parser.parse_args().output
    output.write_text(draw((GUIDE / "measurements.md").read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
